// What lies between the matrix products of decode.py, in bf16. Shapes: N tokens, B rows with one token each, C hidden, I
// intermediate, H query heads, K key/value heads, D head dim.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;  // the upper half of a float

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 narrow(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// y = weight * x / rms(x); x and y (N, C)
void rms_norm(bf16 *y, const bf16 *x, const bf16 *weight, float eps, int64_t N, int64_t C) {
#pragma omp parallel for if (N * C > 8000)
    for (int64_t n = 0; n < N; n++) {
        const bf16 *from = x + n * C;
        float sum = 0;
        for (int64_t c = 0; c < C; c++) sum += wide(from[c]) * wide(from[c]);
        float scale = 1 / sqrtf(sum / C + eps);
        for (int64_t c = 0; c < C; c++) y[n * C + c] = narrow(wide(weight[c]) * wide(narrow(wide(from[c]) * scale)));
    }
}

// y = silu(gate) * up; gate_up (N, 2 I), y (N, I)
void silu_mul(bf16 *y, const bf16 *gate_up, int64_t N, int64_t I) {
#pragma omp parallel for if (N * I > 8000)
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < I; i++) {
            float gate = wide(gate_up[2 * n * I + i]), up = wide(gate_up[(2 * n + 1) * I + i]);
            float minus = gate < -80 ? 80 : -gate;  // fast-math knows no infinity
            y[n * I + i] = narrow(gate / (1 + expf(minus)) * up);
        }
}

// RoPE with the two halves of a head as pairs; x and y (D,), cos and sin (D / 2,)
static void rotate(bf16 *y, const bf16 *x, const float *cos, const float *sin, int64_t D) {
    for (int64_t d = 0; d < D / 2; d++) {
        float left = wide(x[d]), right = wide(x[d + D / 2]);
        y[d] = narrow(left * cos[d] - right * sin[d]);
        y[d + D / 2] = narrow(right * cos[d] + left * sin[d]);
    }
}

// qkv (N, (H + 2 K) D) is N new tokens': the queries are turned where they are, keys and values go into the cache, which
// holds (rows, K, max_len, D) of each, at place at[n] of row rows[n]. cos, sin (N, D / 2).
void write_cache(bf16 *qkv, bf16 *keys, bf16 *values, const float *cos, const float *sin, const int64_t *at,
           const int64_t *rows, int64_t N, int64_t H, int64_t K, int64_t D, int64_t max_len) {
#pragma omp parallel for if (N * (H + 2 * K) * D > 20000)
    for (int64_t n = 0; n < N; n++) {
        bf16 *head = qkv + n * (H + 2 * K) * D, turned[D];
        for (int64_t h = 0; h < H; h++, head += D) {
            rotate(turned, head, cos + n * D / 2, sin + n * D / 2, D);
            memcpy(head, turned, D * sizeof(bf16));
        }
        for (int64_t h = 0; h < K; h++, head += D) {
            int64_t there = ((rows[n] * K + h) * max_len + at[n]) * D;
            rotate(keys + there, head, cos + n * D / 2, sin + n * D / 2, D);
            memcpy(values + there, head + K * D, D * sizeof(bf16));
        }
    }
}

// Attention of one token a row, in the cache by now, to all of its row up to place at[b]. y (B, H D). longest: of all
// at[b] + 1, to see whether a second core pays.
void attend(bf16 *y, const bf16 *qkv, const bf16 *keys, const bf16 *values, const int64_t *at, const int64_t *rows,
            int64_t B, int64_t H, int64_t K, int64_t D, int64_t max_len, int64_t longest) {
    int64_t G = H / K;  // query heads that share a key/value head
#pragma omp parallel for collapse(2) if (B * K * longest * D > 30000)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < K; h++) {
            const bf16 *query = qkv + (b * (H + 2 * K) + h * G) * D;
            const bf16 *k = keys + (rows[b] * K + h) * max_len * D, *v = values + (rows[b] * K + h) * max_len * D;
            int64_t n = at[b] + 1;
            float q[G][D], out[G][D], wider[D], sum[G], scale = 1 / sqrtf(D);
            float(*p)[n] = malloc(G * n * sizeof(float));  // a long context's does not fit on the stack
            for (int64_t g = 0; g < G; g++)
                for (int64_t d = 0; d < D; d++) q[g][d] = scale * wide(query[g * D + d]), out[g][d] = 0;
            for (int64_t t = 0; t < n; t++) {
                for (int64_t d = 0; d < D; d++) wider[d] = wide(k[t * D + d]);
                for (int64_t g = 0; g < G; g++) {
                    float score = 0;
                    for (int64_t d = 0; d < D; d++) score += q[g][d] * wider[d];
                    p[g][t] = score;
                }
            }
            for (int64_t g = 0; g < G; g++) {
                float top = p[g][0];
                for (int64_t t = 1; t < n; t++) top = p[g][t] > top ? p[g][t] : top;
                sum[g] = 0;
                for (int64_t t = 0; t < n; t++) sum[g] += p[g][t] = expf(p[g][t] - top);
            }
            for (int64_t t = 0; t < n; t++) {
                for (int64_t d = 0; d < D; d++) wider[d] = wide(v[t * D + d]);
                for (int64_t g = 0; g < G; g++)
                    for (int64_t d = 0; d < D; d++) out[g][d] += p[g][t] * wider[d];
            }
            for (int64_t g = 0; g < G; g++)
                for (int64_t d = 0; d < D; d++) y[(b * H + h * G + g) * D + d] = narrow(out[g][d] / sum[g]);
            free(p);
        }
}
