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

/* e^x for x <= 88, to 5e-7 of its value (5e-6 without FMA): 2^n e^r with |r| <= ln(2) / 2 and a polynomial for e^r. Plain arithmetic, so
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

/* The largest of x (n), or NaN if one of them is NaN or +infinity. The compiler may assume neither, so this looks at
 * bits. Logits of -1e30 and below have a probability of zero. */
static inline float largest(long n, const real *x) {
    float top = -1e30f;
    uint32_t bad = 0, nan = 0x7fc00000;
    for (long i = 0; i < n; i++) {
        const float value = load(x[i]);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bad |= (bits << 1 > 0xff000000) | (bits == 0x7f800000);
        top = __builtin_fmaxf(top, value);
    }
    if (bad) memcpy(&top, &nan, 4);
    return top;
}

/* out (n, ceil(V / size)): log of the sum of e^(x / temperature) over blocks of `size` of logits x (n, V) */
void block_logits(long n, long V, long size, float temperature, const real *x, float *out) {
    for (long i = 0; i < n; i++, x += V)
        for (long first = 0; first < V; first += size) {
            const long end = first + size < V ? first + size : V;
            const float top = largest(end - first, x + first);
            float sum = 0;
            for (long j = first; j < end; j++) sum += exponential((load(x[j]) - top) / temperature);
            *out++ = top / temperature + __builtin_logf(sum);
        }
}

/* From logits x (n, V) the log-probs of targets (n) at a temperature, entropies (n), and tops and norms (n) of which
 * log p = (x - top) / temperature - norm */
void token_logps(long n, long V, float temperature, const real *x, const long *targets, float *logps, float *entropies,
                 float *tops, float *norms) {
    for (long i = 0; i < n; i++, x += V) {
        const float top = largest(V, x);
        float sum = 0, mean = 0;
        for (long j = 0; j < V; j++) {
            float below = (load(x[j]) - top) / temperature, e = exponential(below);
            sum += e;
            mean += e * __builtin_fmaxf(below, -1e4f);
        }
        tops[i] = top;
        norms[i] = __builtin_logf(sum);
        logps[i] = (load(x[targets[i]]) - top) / temperature - norms[i];
        entropies[i] = norms[i] - mean / sum;
    }
}

/* d_x (n, V) from d_logps (n) */
void token_logps_backward(long n, long V, float temperature, const real *x, const long *targets, const float *tops,
                          const float *norms, const float *d_logps, real *d_x) {
    for (long i = 0; i < n; i++, x += V, d_x += V) {
        const float slope = d_logps[i] / temperature;
        for (long j = 0; j < V; j++) d_x[j] = store(-slope * exponential((load(x[j]) - tops[i]) / temperature - norms[i]));
        const float of_target = exponential((load(x[targets[i]]) - tops[i]) / temperature - norms[i]);
        d_x[targets[i]] = store(slope - slope * of_target);
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

/* Attention in packed batches. Each row of `segments` (S, 5) says: first token, number of tokens, first token of its
 * prompt, number of its prompt's tokens (0 for a prompt itself), number of the batch's first tokens that come before
 * both. These, its prompt and then itself are a segment's keys. */

/* The products of TILE queries and BLOCK keys, or elements of a value, are summed together: in registers of AVX512. */
enum { BLOCK = HEAD_DIM % 32 == 0 ? 32 : HEAD_DIM % 16 == 0 ? 16 : HEAD_DIM, TILE = 8 };

static void *zeros(long n) { return calloc(n, sizeof(float)); }

/* sums (TILE, BLOCK) = x (TILE, n) times columns (n, BLOCK), whose rows lie so many numbers apart */
static void multiply(long n, const float *x, long x_stride, const float *columns, long stride, float *sums, long sums_stride) {
    float kept[TILE][BLOCK] = {0};
    for (long i = 0; i < n; i++)
        for (int q = 0; q < TILE; q++)
            for (int j = 0; j < BLOCK; j++) kept[q][j] += x[q * x_stride + i] * columns[i * stride + j];
    for (int q = 0; q < TILE; q++) memcpy(sums + q * sums_stride, kept[q], sizeof kept[q]);
}

/* products (TILE, size) of queries (TILE, d) and the first m of keys_t (d, size), up to a multiple of BLOCK */
static void with_keys(long m, const float *queries, const float *keys_t, long size, float *products) {
    for (long j = 0; j < m; j += BLOCK) multiply(HEAD_DIM, queries, HEAD_DIM, keys_t + j, size, products + j, size);
}

/* mixed (TILE, d) = weights (TILE, m) times values (m, d) */
static void with_values(long m, const float *weights, long stride, const float *values, float *mixed) {
    for (int c = 0; c < HEAD_DIM; c += BLOCK) multiply(m, weights, stride, values + c, HEAD_DIM, mixed + c, HEAD_DIM);
}

/* The keys, rotated, and values of a segment, up to `size` of them, a multiple of BLOCK: keys, values (size, d) and,
 * transposed, keys_t, values_t (d, size). Of a tile's queries (TILE, d): weights, slopes (TILE, size), a number for each
 * key. Backward, gradients: d_keys, d_values (size, d). */
typedef struct {
    long size;
    float *memory, *keys, *values, *keys_t, *values_t, *weights, *slopes, *d_keys, *d_values;
} Scratch;

static Scratch scratch_for(long max_keys) {
    const long size = (max_keys + BLOCK - 1) / BLOCK * BLOCK, n = size * HEAD_DIM;
    float *m = zeros(6 * n + 2 * TILE * size);
    return (Scratch){size, m, m, m + n, m + 2 * n, m + 3 * n, m + 6 * n, m + 6 * n + TILE * size, m + 4 * n, m + 5 * n};
}

static long keys_before(const long *segment) { return segment[3] + segment[4]; }

static long token_of(const long *segment, long j) { /* which has its key number j */
    if (j < segment[4]) return j;
    return j < keys_before(segment) ? segment[2] + j - segment[4] : segment[0] + j - keys_before(segment);
}

static void collect(long H, long K, long k, const long *segment, const real *qkv, const float *cosines,
                    const float *sines, Scratch scratch) {
    enum { d = HEAD_DIM };
    for (long j = 0; j < keys_before(segment) + segment[1]; j++) {
        const long token = token_of(segment, j);
        const real *heads = qkv + token * (H + 2 * K) * d;
        rotate(heads + (H + k) * d, cosines + token * (d / 2), sines + token * (d / 2), 1, scratch.keys + j * d);
        for (int i = 0; i < d; i++) {
            scratch.values[j * d + i] = load(heads[(H + K + k) * d + i]);
            scratch.keys_t[i * scratch.size + j] = scratch.keys[j * d + i];
            scratch.values_t[i * scratch.size + j] = scratch.values[j * d + i];
        }
    }
}

/* Rotate the n queries of a tile, zeros behind them: places (n) are token * H + head. */
static void take_queries(long n, const long *places, long H, long K, const real *qkv, const float *cosines,
                         const float *sines, float *queries) {
    enum { d = HEAD_DIM };
    memset(queries, 0, TILE * d * sizeof(float));
    for (long u = 0; u < n; u++) {
        const long token = places[u] / H, at = token * (d / 2);
        rotate(qkv + (token * (H + 2 * K) + places[u] % H) * d, cosines + at, sines + at, 1 / __builtin_sqrtf(d), queries + u * d);
    }
}

/* Set the places of a tile's queries, those of `segment` and key head k from number `first` on; return how many. */
static long tile_at(const long *segment, long first, long H, long K, long k, long *places) {
    const long R = H / K, left = segment[1] * R - first, n = left < TILE ? left : TILE;
    for (long u = 0; u < n; u++) places[u] = (segment[0] + (first + u) / R) * H + k * R + (first + u) % R;
    return n;
}

/* Replace scores (m) by e^(score - top), the largest of them; return their sum, or NaN if one is not finite. */
static inline float exponentials(long m, float *scores, float *top) {
    float sum = 0, all = 0;
    uint32_t bits, nan = 0x7fc00000;
    *top = -1e30f;
    for (long j = 0; j < m; j++) all += scores[j];
    for (long j = 0; j < m; j++) *top = __builtin_fmaxf(*top, scores[j]);
    for (long j = 0; j < m; j++) sum += scores[j] = exponential(scores[j] - *top);
    memcpy(&bits, &all, 4);
    if (bits << 1 >= 0xff000000) memcpy(&sum, &nan, 4);
    return sum;
}

/* out (N, H d); top and total (N, H), which the backward pass needs: the largest score and the sum of the exponentials */
void packed(long S, long H, long K, long max_keys, const long *segments, const real *qkv, const float *cosines,
            const float *sines, real *out, float *top, float *total) {
    enum { d = HEAD_DIM };
    const Scratch scratch = scratch_for(max_keys);
    long n, places[TILE];
    float queries[TILE * d], mixed[TILE * d];
    for (long s = 0; s < S; s++, segments += 5)
        for (long k = 0; k < K && segments[1]; k++) {
            const long before = keys_before(segments) + 1 - segments[0]; /* a token's keys, less its number */
            collect(H, K, k, segments, qkv, cosines, sines, scratch);
            for (long first = 0; (n = tile_at(segments, first, H, K, k, places)) > 0; first += TILE) {
                const long most = before + places[n - 1] / H;
                take_queries(n, places, H, K, qkv, cosines, sines, queries);
                with_keys(most, queries, scratch.keys_t, scratch.size, scratch.weights);
                for (long u = 0; u < n; u++) {
                    const long m = before + places[u] / H;
                    float *weights = scratch.weights + u * scratch.size;
                    total[places[u]] = exponentials(m, weights, top + places[u]);
                    for (long j = m; j < most; j++) weights[j] = 0;
                }
                with_values(most, scratch.weights, scratch.size, scratch.values, mixed);
                for (long u = 0; u < n; u++)
                    for (int c = 0; c < d; c++) out[places[u] * d + c] = store(mixed[u * d + c] / total[places[u]]);
            }
        }
    free(scratch.memory);
}

/* Ask for a key or value that will be needed soon: the memory is the limit. */
static inline void fetch(const real *x) {
    for (int i = 0; i < HEAD_DIM * (int)sizeof(real); i += 64) __builtin_prefetch((const char *)x + i);
}

/* scores (m) of a query (d) and keys (m, d); fetch as many rows that are needed next */
static void score(long m, const float *query, const real *keys, const real *next, float *scores) {
    float q[HEAD_DIM];
    memcpy(q, query, sizeof q);
    for (long j = 0; j < m; j++) {
        fetch(next + j * HEAD_DIM);
        float sum = 0;
        for (int i = 0; i < HEAD_DIM; i++) sum += q[i] * load(keys[j * HEAD_DIM + i]);
        scores[j] = sum;
    }
}

/* mixed (d) += weights (m) times values (m, d); fetch as many rows that are needed next */
static void mix(long m, const float *weights, const real *values, const real *next, float *mixed) {
    float sums[HEAD_DIM];
    memcpy(sums, mixed, sizeof sums);
    for (long j = 0; j < m; j++) {
        fetch(next + j * HEAD_DIM);
        for (int i = 0; i < HEAD_DIM; i++) sums[i] += weights[j] * load(values[j * HEAD_DIM + i]);
    }
    memcpy(mixed, sums, sizeof sums);
}

/* One step of attention with a cache. Each of the P * G rows rotates its queries and its key, stores key and value at
 * `t` of its response, and attends to its group's prompt and to its own response:
 *
 *     qkv (P * G, (H + 2 K) d) before rotation; cosines, sines (P * G, d / 2); lengths (P) of the prompts
 *     prompt_k, prompt_v (P, K, Tp, d), response_k, response_v (P * G, K, T, d)
 *     out (P * G, H d)
 *
 * A group's queries of a prompt are taken in tiles, if they fill more than one.
 */
void attend(long P, long G, long H, long K, long Tp, long T, long t, const real *qkv, const float *cosines,
            const float *sines, const long *lengths, const real *prompt_k, const real *prompt_v, real *response_k,
            real *response_v, real *out) {
    enum { d = HEAD_DIM };
    const long size = (Tp + T + BLOCK - 1) / BLOCK * BLOCK, tiled = G * H / K > TILE;
    float *keys_t = malloc((2 * d + TILE) * size * sizeof(float)), *values = keys_t + d * size, *weights = values + d * size;
    long tile, places[TILE];
    float queries[TILE * d], mixed[TILE * d], sums[TILE], top, key[d];
    for (long p = 0; p < P; p++)
        for (long k = 0; k < K; k++) {
            const long rows[] = {p * G, G}, n = lengths[p];
            const real *old_keys = prompt_k + (p * K + k) * Tp * d, *old_values = prompt_v + (p * K + k) * Tp * d;
            for (long j = 0; j < n && tiled; j++)
                for (int i = 0; i < d; i++) {
                    keys_t[i * size + j] = load(old_keys[j * d + i]);
                    values[j * d + i] = load(old_values[j * d + i]);
                }
            for (long row = p * G; row < (p + 1) * G; row++) {
                const real *heads = qkv + row * (H + 2 * K) * d;
                const long at = ((row * K + k) * T + t) * d;
                rotate(heads + (H + k) * d, cosines + row * (d / 2), sines + row * (d / 2), 1, key);
                for (int i = 0; i < d; i++) response_k[at + i] = store(key[i]);
                memcpy(response_v + at, heads + (H + K + k) * d, d * sizeof(real));
            }
            for (long first = 0; (tile = tile_at(rows, first, H, K, k, places)) > 0; first += TILE) {
                take_queries(tile, places, H, K, qkv, cosines, sines, queries);
                if (tiled) with_keys(n, queries, keys_t, size, weights);
                for (long u = 0; u < tile; u++) {
                    const long own = (places[u] / H * K + k) * T * d;
                    float *scores = weights + u * size;
                    if (!tiled) score(n, queries + u * d, old_keys, old_values, scores);
                    score(t + 1, queries + u * d, response_k + own, response_v + own, scores + n);
                    sums[u] = exponentials(n + t + 1, scores, &top);
                }
                if (tiled)
                    with_values(n, weights, size, values, mixed);
                else
                    memset(mixed, 0, sizeof mixed);
                for (long u = 0; u < tile; u++) {
                    const long own = (places[u] / H * K + k) * T * d, next_tile = own + TILE * K / H * K * T * d;
                    const float *scores = weights + u * size;
                    if (!tiled) mix(n, scores, old_values, old_keys, mixed + u * d);
                    mix(t + 1, scores + n, response_v + own, response_k + next_tile, mixed + u * d);
                    for (int i = 0; i < d; i++) out[places[u] * d + i] = store(mixed[u * d + i] / sums[u]);
                }
            }
        }
    free(keys_t);
}

static void rotate_back(const float *x, const float *cosines, const float *sines, real *out) {
    enum { half = HEAD_DIM / 2 };
    for (int i = 0; i < half; i++) {
        out[i] = store(x[i] * cosines[i] + x[i + half] * sines[i]);
        out[i + half] = store(x[i + half] * cosines[i] - x[i] * sines[i]);
    }
}

/* sums (m, d) += numbers (TILE, m), transposed, times rows (TILE, d) */
static void add_products(long m, const float *numbers, long stride, const float *rows, float *sums) {
    for (long j = 0; j < m; j++, sums += HEAD_DIM) {
        float kept[HEAD_DIM];
        memcpy(kept, sums, sizeof kept);
        for (int u = 0; u < TILE; u++)
            for (int e = 0; e < HEAD_DIM; e++) kept[e] += numbers[u * stride + j] * rows[u * HEAD_DIM + e];
        memcpy(sums, kept, sizeof kept);
    }
}

/* d_qkv (N, (H + 2 K) d) from d_out (N, H d) */
void packed_backward(long N, long S, long H, long K, long max_keys, const long *segments, const real *qkv,
                     const float *cosines, const float *sines, const float *top, const float *total, const real *d_out,
                     real *d_qkv) {
    enum { d = HEAD_DIM };
    const Scratch scratch = scratch_for(max_keys);
    const long size = scratch.size;
    long n, places[TILE];
    float queries[TILE * d], d_mixed[TILE * d] = {0}, d_queries[TILE * d];
    float *d_keys = zeros(N * K * d), *d_values = zeros(N * K * d);
    for (long s = 0; s < S; s++, segments += 5)
        for (long k = 0; k < K && segments[1]; k++) {
            const long before = keys_before(segments) + 1 - segments[0];
            collect(H, K, k, segments, qkv, cosines, sines, scratch);
            memset(scratch.d_keys, 0, 2 * size * d * sizeof(float)); /* and d_values, which follow */
            for (long first = 0; (n = tile_at(segments, first, H, K, k, places)) > 0; first += TILE) {
                const long most = before + places[n - 1] / H;
                take_queries(n, places, H, K, qkv, cosines, sines, queries);
                for (long u = 0; u < n; u++)
                    for (int e = 0; e < d; e++) d_mixed[u * d + e] = load(d_out[places[u] * d + e]);
                with_keys(most, queries, scratch.keys_t, size, scratch.weights);
                with_keys(most, d_mixed, scratch.values_t, size, scratch.slopes);
                for (long u = 0; u < TILE; u++) {
                    const long m = u < n ? before + places[u] / H : 0;
                    float *weights = scratch.weights + u * size, *slopes = scratch.slopes + u * size, along = 0;
                    for (long j = 0; j < m; j++) {
                        weights[j] = exponential(weights[j] - top[places[u]]) / total[places[u]];
                        along += weights[j] * slopes[j];
                    }
                    for (long j = 0; j < m; j++) slopes[j] = weights[j] * (slopes[j] - along);
                    for (long j = m; j < most; j++) weights[j] = slopes[j] = 0;
                }
                with_values(most, scratch.slopes, size, scratch.keys, d_queries);
                add_products(most, scratch.slopes, size, queries, scratch.d_keys);
                add_products(most, scratch.weights, size, d_mixed, scratch.d_values);
                for (long u = 0; u < n; u++) {
                    const long token = places[u] / H, at = token * (d / 2);
                    for (int e = 0; e < d; e++) d_queries[u * d + e] *= 1 / __builtin_sqrtf(d);
                    rotate_back(d_queries + u * d, cosines + at, sines + at, d_qkv + (token * (H + 2 * K) + places[u] % H) * d);
                }
            }
            for (long j = 0; j < keys_before(segments) + segments[1]; j++) {
                const long at = (token_of(segments, j) * K + k) * d;
                for (int e = 0; e < d; e++) {
                    d_keys[at + e] += scratch.d_keys[j * d + e];
                    d_values[at + e] += scratch.d_values[j * d + e];
                }
            }
        }
    for (long token = 0; token < N; token++)
        for (long k = 0; k < K; k++) {
            real *to = d_qkv + (token * (H + 2 * K) + H + k) * d;
            rotate_back(d_keys + (token * K + k) * d, cosines + token * (d / 2), sines + token * (d / 2), to);
            for (int e = 0; e < d; e++) to[K * d + e] = store(d_values[(token * K + k) * d + e]);
        }
    free(scratch.memory), free(d_keys), free(d_values);
}

#endif
