/* What a transformer on the CPU does between its matrix products, fused: see kernels.py.
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

/* sum (n, D) = x + added, which may be x itself, and out (n, D) = sum / rms(sum) * weight */
void add_rms_norm(long n, long D, float eps, const float *x, const real *added, const float *weight, float *sum,
                  real *out) {
    for (long i = 0; i < n; i++, x += D, added += D, sum += D, out += D) {
        float squares = 0;
        for (long j = 0; j < D; j++) {
            sum[j] = x[j] + load(added[j]);
            squares += sum[j] * sum[j];
        }
        float scale = 1 / __builtin_sqrtf(squares / D + eps);
        for (long j = 0; j < D; j++) out[j] = store(sum[j] * scale * weight[j]);
    }
}

/* From the gradients of `sum` and `out`, d_sum and d_out, those of x, of `added` (the same, in its type) and, added up
 * in d_weight (D), of the weight. */
void add_rms_norm_backward(long n, long D, float eps, const float *sum, const float *weight, const float *d_sum,
                           const real *d_out, float *d_x, real *d_added, float *d_weight) {
    for (long i = 0; i < n; i++, sum += D, d_sum += D, d_out += D, d_x += D, d_added += D) {
        float squares = 0, along = 0;
        for (long j = 0; j < D; j++) {
            squares += sum[j] * sum[j];
            along += load(d_out[j]) * weight[j] * sum[j];
        }
        float scale = 1 / __builtin_sqrtf(squares / D + eps), back = along * scale * scale / D;
        for (long j = 0; j < D; j++) {
            d_weight[j] += load(d_out[j]) * sum[j] * scale;
            d_x[j] = d_sum[j] + (load(d_out[j]) * weight[j] - sum[j] * back) * scale;
            d_added[j] = store(d_x[j]);
        }
    }
}

static inline float sigmoid(float x) { return 1 / (1 + exponential(__builtin_fminf(-x, 80))); }

/* out (n, I) = silu(gate) * up of gate_up (n, 2 I) */
void swiglu(long n, long I, const real *gate_up, real *out) {
    for (long i = 0; i < n; i++, gate_up += 2 * I, out += I)
        for (long j = 0; j < I; j++) {
            float gate = load(gate_up[j]);
            out[j] = store(gate * sigmoid(gate) * load(gate_up[I + j]));
        }
}

void swiglu_backward(long n, long I, const real *gate_up, const real *d_out, real *d_gate_up) {
    for (long i = 0; i < n; i++, gate_up += 2 * I, d_out += I, d_gate_up += 2 * I)
        for (long j = 0; j < I; j++) {
            float gate = load(gate_up[j]), up = load(gate_up[I + j]), d = load(d_out[j]), s = sigmoid(gate);
            d_gate_up[j] = store(d * up * s * (1 + gate * (1 - s)));
            d_gate_up[I + j] = store(d * gate * s);
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
