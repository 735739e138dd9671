/* What a transformer on the CPU does between its matrix products, fused: see kernels.py.
 *
 * Compiled with -DBF16 for 16-bit weights and with -DHEAD_DIM=d for attention, which is left out without. Arrays are
 * contiguous; `real` is the type of the weights, sums are floats. Each call runs on one thread.
 */

#include <stdint.h>
#include <stdlib.h>
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

/* out (n, ceil(V / size)): log of the sum of e^(x / temperature) over blocks of `size` of logits x (n, V) */
void block_logits(long n, long V, long size, float temperature, const float *x, float *out) {
    for (long i = 0; i < n; i++, x += V)
        for (long first = 0; first < V; first += size) {
            const long end = first + size < V ? first + size : V;
            float top = x[first], sum = 0;
            for (long j = first; j < end; j++) top = __builtin_fmaxf(top, x[j]);
            for (long j = first; j < end; j++) sum += exponential((x[j] - top) / temperature);
            *out++ = top / temperature + __builtin_logf(sum);
        }
}

/* From logits x (n, V) the log-probs of targets (n) at a temperature, entropies (n), and the norms (n) of which
 * log p = x / temperature - norm */
void token_logps(long n, long V, float temperature, const float *x, const long *targets, float *logps, float *entropies,
                 float *norms) {
    for (long i = 0; i < n; i++, x += V) {
        float top = x[0], sum = 0, mean = 0;
        for (long j = 0; j < V; j++) top = __builtin_fmaxf(top, x[j]);
        for (long j = 0; j < V; j++) {
            float below = (x[j] - top) / temperature, e = exponential(below);
            sum += e;
            mean += e * __builtin_fmaxf(below, -1e4f);
        }
        norms[i] = top / temperature + __builtin_logf(sum);
        logps[i] = x[targets[i]] / temperature - norms[i];
        entropies[i] = __builtin_logf(sum) - mean / sum;
    }
}

void token_logps_backward(long n, long V, float temperature, const float *x, const long *targets, const float *norms,
                          const float *d_logps, float *d_x) {
    for (long i = 0; i < n; i++, x += V, d_x += V) {
        const float slope = d_logps[i] / temperature;
        for (long j = 0; j < V; j++) d_x[j] = -slope * exponential(x[j] / temperature - norms[i]);
        d_x[targets[i]] += slope;
    }
}

#ifdef HEAD_DIM

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

/* Attention in packed batches. Each row of `segments` (S, 4) says: first token, number of tokens, first token of its
 * prompt, number of its prompt's tokens (0 for a prompt itself). A segment's keys are its prompt and then itself. */

enum { BLOCK = 64 }; /* keys whose scores are summed in registers */

static void *zeros(long n) { return calloc(n, sizeof(float)); }

/* The keys, rotated, and values of a segment, up to `size` of them, a multiple of BLOCK: keys, values (size, d) and,
 * transposed, keys_t, values_t (d, size); and a number for each key, weights (size). */
typedef struct {
    long size;
    float *memory, *keys, *values, *keys_t, *values_t, *weights;
} Scratch;

static Scratch scratch_for(long max_keys) {
    const long size = (max_keys + BLOCK - 1) / BLOCK * BLOCK, n = size * HEAD_DIM;
    float *memory = zeros(4 * n + size);
    return (Scratch){size, memory, memory, memory + n, memory + 2 * n, memory + 3 * n, memory + 4 * n};
}

static void collect(long H, long K, long k, const long *segment, const real *qkv, const float *cosines,
                    const float *sines, Scratch scratch) {
    enum { d = HEAD_DIM };
    for (long j = 0; j < segment[3] + segment[1]; j++) {
        long token = j < segment[3] ? segment[2] + j : segment[0] + j - segment[3];
        const real *heads = qkv + token * (H + 2 * K) * d;
        rotate(heads + (H + k) * d, cosines + token * (d / 2), sines + token * (d / 2), 1, scratch.keys + j * d);
        for (int i = 0; i < d; i++) {
            scratch.values[j * d + i] = load(heads[(H + K + k) * d + i]);
            scratch.keys_t[i * scratch.size + j] = scratch.keys[j * d + i];
            scratch.values_t[i * scratch.size + j] = scratch.values[j * d + i];
        }
    }
}

/* products (m) = x (d) times columns (d, size); may write up to the next multiple of BLOCK */
static void multiply(long m, long size, const float *x, const float *columns, float *products) {
    for (long first = 0; first < m; first += BLOCK) {
        float sums[BLOCK];
        for (int j = 0; j < BLOCK; j++) sums[j] = 0;
        for (int i = 0; i < HEAD_DIM; i++)
            for (int j = 0; j < BLOCK; j++) sums[j] += x[i] * columns[i * size + first + j];
        memcpy(products + first, sums, sizeof sums);
    }
}

/* out (N, H d); top and total (N, H), which the backward pass needs: the largest score and the sum of the exponentials */
void packed(long S, long H, long K, long max_keys, const long *segments, const real *qkv, const float *cosines,
            const float *sines, real *out, float *top, float *total) {
    enum { d = HEAD_DIM };
    const float scale = 1 / __builtin_sqrtf(d);
    const Scratch scratch = scratch_for(max_keys);
    float *weights = scratch.weights;
    for (long s = 0; s < S; s++, segments += 4)
        for (long k = 0; k < K; k++) {
            collect(H, K, k, segments, qkv, cosines, sines, scratch);
            for (long i = 0; i < segments[1]; i++)
                for (long h = k * (H / K); h < (k + 1) * (H / K); h++) {
                    const long token = segments[0] + i, m = segments[3] + i + 1, place = token * H + h;
                    float q[d], mixed[d], largest = -1e30f, sum = 0;
                    rotate(qkv + (token * (H + 2 * K) + h) * d, cosines + token * (d / 2), sines + token * (d / 2), scale, q);
                    multiply(m, scratch.size, q, scratch.keys_t, weights);
                    for (long j = 0; j < m; j++) largest = __builtin_fmaxf(largest, weights[j]);
                    for (long j = 0; j < m; j++) sum += weights[j] = exponential(weights[j] - largest);
                    for (int c = 0; c < d; c++) mixed[c] = 0;
                    for (long j = 0; j < m; j++)
                        for (int c = 0; c < d; c++) mixed[c] += weights[j] * scratch.values[j * d + c];
                    for (int c = 0; c < d; c++) out[place * d + c] = store(mixed[c] / sum);
                    top[place] = largest;
                    total[place] = sum;
                }
        }
    free(scratch.memory);
}

static void rotate_back(const float *x, const float *cosines, const float *sines, real *out) {
    enum { half = HEAD_DIM / 2 };
    for (int i = 0; i < half; i++) {
        out[i] = store(x[i] * cosines[i] + x[i + half] * sines[i]);
        out[i + half] = store(x[i + half] * cosines[i] - x[i] * sines[i]);
    }
}

/* d_qkv (N, (H + 2 K) d) from d_out (N, H d) */
void packed_backward(long N, long S, long H, long K, long max_keys, const long *segments, const real *qkv,
                     const float *cosines, const float *sines, const float *top, const float *total, const real *d_out,
                     real *d_qkv) {
    enum { d = HEAD_DIM };
    const float scale = 1 / __builtin_sqrtf(d);
    const Scratch scratch = scratch_for(max_keys);
    float *weights = scratch.weights, *slopes = zeros(scratch.size), *d_keys = zeros(N * K * d), *d_values = zeros(N * K * d);
    for (long s = 0; s < S; s++, segments += 4)
        for (long k = 0; k < K; k++) {
            collect(H, K, k, segments, qkv, cosines, sines, scratch);
            for (long i = 0; i < segments[1]; i++)
                for (long h = k * (H / K); h < (k + 1) * (H / K); h++) {
                    const long token = segments[0] + i, m = segments[3] + i + 1, place = token * H + h;
                    const float *c = cosines + token * (d / 2), *sn = sines + token * (d / 2);
                    float q[d], d_mixed[d], d_q[d], along = 0, share = 1 / total[place];
                    rotate(qkv + (token * (H + 2 * K) + h) * d, c, sn, scale, q);
                    for (int e = 0; e < d; e++) d_mixed[e] = load(d_out[place * d + e]), d_q[e] = 0;
                    multiply(m, scratch.size, q, scratch.keys_t, weights);
                    multiply(m, scratch.size, d_mixed, scratch.values_t, slopes);
                    for (long j = 0; j < m; j++) {
                        weights[j] = exponential(weights[j] - top[place]) * share;
                        along += weights[j] * slopes[j];
                    }
                    for (long j = 0; j < m; j++) slopes[j] = weights[j] * (slopes[j] - along);
                    for (long j = 0; j < m; j++) {
                        long from = j < segments[3] ? segments[2] + j : segments[0] + j - segments[3];
                        float *d_key = d_keys + (from * K + k) * d, *d_value = d_values + (from * K + k) * d;
                        for (int e = 0; e < d; e++) {
                            d_q[e] += slopes[j] * scratch.keys[j * d + e];
                            d_key[e] += slopes[j] * q[e];
                            d_value[e] += weights[j] * d_mixed[e];
                        }
                    }
                    for (int e = 0; e < d; e++) d_q[e] *= scale;
                    rotate_back(d_q, c, sn, d_qkv + (token * (H + 2 * K) + h) * d);
                }
        }
    for (long token = 0; token < N; token++)
        for (long k = 0; k < K; k++) {
            real *to = d_qkv + (token * (H + 2 * K) + H + k) * d;
            rotate_back(d_keys + (token * K + k) * d, cosines + token * (d / 2), sines + token * (d / 2), to);
            for (int e = 0; e < d; e++) to[K * d + e] = store(d_values[(token * K + k) * d + e]);
        }
    free(scratch.memory), free(slopes), free(d_keys), free(d_values);
}

#endif
