// What lies between the matrix products of a step that reads one new token a row (decode.py), in bf16.
// Shapes: B rows, C hidden, I intermediate, H query heads, K key/value heads, D head dim.
#include <math.h>
#include <stdint.h>
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

// y = weight * x / rms(x); x and y (B, C)
void rms_norm(bf16 *y, const bf16 *x, const bf16 *weight, float eps, int64_t B, int64_t C) {
#pragma omp parallel for if (B * C > 8000)
    for (int64_t b = 0; b < B; b++) {
        const bf16 *from = x + b * C;
        float sum = 0;
        for (int64_t c = 0; c < C; c++) sum += wide(from[c]) * wide(from[c]);
        float scale = 1 / sqrtf(sum / C + eps);
        for (int64_t c = 0; c < C; c++) y[b * C + c] = narrow(wide(weight[c]) * wide(narrow(wide(from[c]) * scale)));
    }
}

// y = silu(gate) * up; gate_up (B, 2 I), y (B, I)
void silu_mul(bf16 *y, const bf16 *gate_up, int64_t B, int64_t I) {
#pragma omp parallel for if (B * I > 8000)
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < I; i++) {
            float gate = wide(gate_up[2 * b * I + i]), up = wide(gate_up[(2 * b + 1) * I + i]);
            float minus = gate < -80 ? 80 : -gate;  // fast-math knows no infinity
            y[b * I + i] = narrow(gate / (1 + expf(minus)) * up);
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

// Attention of one query position a row. qkv (B, (H + 2 K) D) is the new token's; its key and value are written into
// the cache, keys and values (B, K, max_len, D), at place at[b], and all up to there is read. cos, sin (B, D / 2);
// y (B, H D). longest: of all at[b] + 1, to see whether a second core pays.
void attend(bf16 *y, const bf16 *qkv, bf16 *keys, bf16 *values, const float *cos, const float *sin, const int64_t *at,
            int64_t B, int64_t H, int64_t K, int64_t D, int64_t max_len, int64_t longest) {
    int64_t G = H / K;  // query heads that share a key/value head
#pragma omp parallel for collapse(2) if (B * K * longest * D > 30000)
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < K; h++) {
            const bf16 *row = qkv + b * (H + 2 * K) * D;
            const float *c = cos + b * D / 2, *s = sin + b * D / 2;
            bf16 *k = keys + (b * K + h) * max_len * D, *v = values + (b * K + h) * max_len * D, rotated[D];
            int64_t n = at[b] + 1, even = (n + 15) / 16 * 16;  // whole vectors, else all that lies behind p is split
            float q[G][D], p[G][even], out[G][D], wider[D], scale = 1 / sqrtf(D);
            rotate(k + at[b] * D, row + (H + h) * D, c, s, D);
            memcpy(v + at[b] * D, row + (H + K + h) * D, D * sizeof(bf16));
            for (int64_t g = 0; g < G; g++) {
                rotate(rotated, row + (h * G + g) * D, c, s, D);
                for (int64_t d = 0; d < D; d++) q[g][d] = scale * wide(rotated[d]), out[g][d] = 0;
            }
            for (int64_t t = 0; t < n; t++) {
                for (int64_t d = 0; d < D; d++) wider[d] = wide(k[t * D + d]);
                for (int64_t g = 0; g < G; g++) {
                    float score = 0;
                    for (int64_t d = 0; d < D; d++) score += q[g][d] * wider[d];
                    p[g][t] = score;
                }
            }
            float sum[G];
            for (int64_t g = 0; g < G; g++) {
                float top = p[g][0];
                for (int64_t t = 1; t < n; t++) top = p[g][t] > top ? p[g][t] : top;
                sum[g] = 0;
                for (int64_t t = 0; t < n; t++)  // below -80 floats become denormal, and slow
                    sum[g] += p[g][t] = expf(p[g][t] - top);
            }
            for (int64_t t = 0; t < n; t++) {
                for (int64_t d = 0; d < D; d++) wider[d] = wide(v[t * D + d]);
                for (int64_t g = 0; g < G; g++)
                    for (int64_t d = 0; d < D; d++) out[g][d] += p[g][t] * wider[d];
            }
            for (int64_t g = 0; g < G; g++)
                for (int64_t d = 0; d < D; d++) y[(b * H + h * G + g) * D + d] = narrow(out[g][d] / sum[g]);
        }
}
