/* What a decoding step on the CPU does between its matrix products, fused: see kernels.py.
 *
 * Compiled with -DHEAD_DIM=d and, for 16-bit weights, -DBF16. Arrays are contiguous unless a stride is given; `real`
 * is the type of the weights, sums are floats. Each call runs on one thread.
 */

#include <stdint.h>
#include <string.h>

#ifdef BF16
typedef uint16_t real;
static inline float load(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline real store(float value) { /* rounds to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float real;
static inline float load(real x) { return x; }
static inline real store(float value) { return value; }
#endif

/* e^x for x <= 88, to 1e-7 of its value: 2^n e^r with |r| <= ln(2) / 2 and a polynomial for e^r. Plain arithmetic, so
 * that compilers vectorise the loops around it. */
static inline float exponential(float x) {
    x = __builtin_fmaxf(x, -87);
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float e = 1 + r + r * r * (0.5f + r * (0.166666546f + r * (4.16664853e-2f + r * (8.33336477e-3f + r * 1.39314e-3f))));
    uint32_t bits = (uint32_t)((int)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}

/* x (n, D) += added, out (n, D) = x / rms(x) * weight */
void add_rms_norm(long n, long D, float eps, float *x, const real *added, const float *weight, real *out) {
    for (long i = 0; i < n; i++, x += D, added += D, out += D) {
        float sum = 0;
        for (long j = 0; j < D; j++) {
            x[j] += load(added[j]);
            sum += x[j] * x[j];
        }
        float scale = 1 / __builtin_sqrtf(sum / D + eps);
        for (long j = 0; j < D; j++) out[j] = store(x[j] * scale * weight[j]);
    }
}

/* out (n, I) = silu(gate) * up of gate_up (n, 2 I) */
void swiglu(long n, long I, const real *gate_up, real *out) {
    for (long i = 0; i < n; i++, gate_up += 2 * I, out += I)
        for (long j = 0; j < I; j++) {
            float gate = load(gate_up[j]), up = load(gate_up[I + j]);
            out[j] = store(gate / (1 + exponential(__builtin_fminf(-gate, 80))) * up);
        }
}

static inline void rotate(const real *x, const float *cosines, const float *sines, float scale, float *out) {
    enum { half = HEAD_DIM / 2 };
    for (int i = 0; i < half; i++) {
        float a = load(x[i]), b = load(x[i + half]);
        out[i] = (a * cosines[i] - b * sines[i]) * scale;
        out[i + half] = (b * cosines[i] + a * sines[i]) * scale;
    }
}

/* One step of attention with a cache. Each of the P * G rows rotates its queries and its key, stores key and value at
 * `t` of its response, and attends to its group's prompt and to its own response:
 *
 *     qkv (P * G, (H + 2 K) d) before rotation; cosines, sines (P * G, d / 2); lengths (P) of the prompts
 *     prompt_k, prompt_v (P, K, Tp, d), response_k, response_v (P * G, K, T, d)
 *     out (P * G, H d)
 */
void attend(long P, long G, long H, long K, long Tp, long T, long t, const real *qkv, const float *cosines,
            const float *sines, const long *lengths, const real *prompt_k, const real *prompt_v, real *response_k,
            real *response_v, real *out) {
    enum { d = HEAD_DIM };
    const long shared = H / K;
    const float scale = 1 / __builtin_sqrtf(d);
    for (long row = 0; row < P * G; row++) {
        float scores[Tp + T];
        for (long k = 0; k < K; k++) {
            const real *heads = qkv + row * (H + 2 * K) * d;
            const float *c = cosines + row * (d / 2), *s = sines + row * (d / 2);
            const real *old_keys = prompt_k + (row / G * K + k) * Tp * d, *old_values = prompt_v + (row / G * K + k) * Tp * d;
            real *keys = response_k + (row * K + k) * T * d, *values = response_v + (row * K + k) * T * d;
            float key[d];
            rotate(heads + (H + k) * d, c, s, 1, key);
            for (int i = 0; i < d; i++) keys[t * d + i] = store(key[i]);
            memcpy(values + t * d, heads + (H + K + k) * d, d * sizeof(real));

            const long n = lengths[row / G], total = n + t + 1;
            for (long h = k * shared; h < (k + 1) * shared; h++) {
                float q[d], mixed[d], top = -1e30f, sum = 0;
                rotate(heads + h * d, c, s, scale, q);
                for (long j = 0; j < total; j++) {
                    const real *at = j < n ? old_keys + j * d : keys + (j - n) * d;
                    /* The memory is the limit: ask for the values now, and below for the next head's keys. */
                    if (j >= n)
                        for (int i = 0; i < d * (int)sizeof(real); i += 64)
                            __builtin_prefetch((const char *)(values + (j - n) * d) + i);
                    float score = 0;
                    for (int i = 0; i < d; i++) score += q[i] * load(at[i]);
                    scores[j] = score;
                    top = score > top ? score : top;
                }
                for (long j = 0; j < total; j++) sum += scores[j] = exponential(scores[j] - top);
                for (int i = 0; i < d; i++) mixed[i] = 0;
                for (long j = 0; j < total; j++) {
                    const real *at = j < n ? old_values + j * d : values + (j - n) * d;
                    if (j >= n)
                        for (int i = 0; i < d * (int)sizeof(real); i += 64)
                            __builtin_prefetch((const char *)(keys + (T + j - n) * d) + i);
                    for (int i = 0; i < d; i++) mixed[i] += scores[j] * load(at[i]);
                }
                for (int i = 0; i < d; i++) out[(row * H + h) * d + i] = store(mixed[i] / sum);
            }
        }
    }
}
