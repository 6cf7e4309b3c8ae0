/* What a block of a model does between its matrix products, each in one pass over memory.
 *
 * Hidden states are float32, what goes into products and comes out of them is bfloat16. All is computed
 * in float32 and rounded once. torch does the same in several passes, with copies between them.
 * layers_reference.py is the definition. Rows are contiguous and follow one another.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float wide(bfloat16 bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* Round to nearest, ties to even; every NaN becomes the one that torch writes. */
static inline bfloat16 narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return (bfloat16)(value != value ? 0x7fc0 : rounded);
}

/* e^x = 2^n e^r with |r| <= ln(2) / 2, the second by a polynomial (Cephes), to 2 units in the last
 * place. Infinite from 88.4 on; below -87 it is 1.6e-38; NaN stays NaN. */
static inline float exponential(float x) {
    x = x > 88.8f ? 88.8f : x;
    x = x < -87.0f ? -87.0f : x;
    const float to_integer = 12582912.0f; /* adding it rounds to an integer, in the low bits */
    float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t word;
    memcpy(&word, &shifted, 4);
    word = (word << 23) + 0x3f800000; /* 2^n: of `shifted` the low bits are n */
    float power;
    memcpy(&power, &word, 4);
    return p * power;
}

/* --- GELU by tanh: x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), s the logistic function ---------- */

#define TWICE_ROOT 1.5957691216f /* 2 sqrt(2/pi) */
#define CUBIC 0.044715f

static inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

void mpmp_gelu(int64_t n, const bfloat16 *x, bfloat16 *y) {
    for (int64_t i = 0; i < n; i++) {
        float v = wide(x[i]);
        y[i] = narrow(v * logistic(TWICE_ROOT * (v + CUBIC * v * v * v)));
    }
}

void mpmp_gelu_backward(int64_t n, const bfloat16 *x, const bfloat16 *y_grad, bfloat16 *x_grad) {
    for (int64_t i = 0; i < n; i++) {
        float v = wide(x[i]), square = v * v;
        float s = logistic(TWICE_ROOT * (v + CUBIC * v * square));
        float slope = s + v * s * (1.0f - s) * TWICE_ROOT * (1.0f + 3.0f * CUBIC * square);
        x_grad[i] = narrow(wide(y_grad[i]) * slope);
    }
}

/* --- the sum of a residual and its branch ------------------------------------------------------ */

/* `sum` may be `x`. */
void mpmp_add(int64_t n, const float *x, const bfloat16 *branch, float *sum) {
    for (int64_t i = 0; i < n; i++) sum[i] = x[i] + wide(branch[i]);
}

/* --- LayerNorm whose result products take ------------------------------------------------------ */

/* y = (x - mean) rstd weight + bias for each row of d; `mean` and `rstd` are kept for backward. */
void mpmp_layer_norm(int64_t rows, int64_t d, const float *x, const float *weight, const float *bias,
                     float epsilon, bfloat16 *y, float *mean, float *rstd) {
    for (int64_t row = 0; row < rows; row++, x += d, y += d) {
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += x[i];
        float middle = sum / (float)d;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < d; i++) squares += (x[i] - middle) * (x[i] - middle);
        float scale = 1.0f / sqrtf(squares / (float)d + epsilon);
        for (int64_t i = 0; i < d; i++) y[i] = narrow((x[i] - middle) * scale * weight[i] + bias[i]);
        mean[row] = middle;
        rstd[row] = scale;
    }
}

/* Adds to `weight_grad` and `bias_grad`. */
void mpmp_layer_norm_backward(int64_t rows, int64_t d, const bfloat16 *y_grad, const float *x,
                              const float *weight, const float *mean, const float *rstd,
                              float *x_grad, float *weight_grad, float *bias_grad) {
    for (int64_t row = 0; row < rows; row++, x += d, y_grad += d, x_grad += d) {
        float middle = mean[row], scale = rstd[row], along = 0, level = 0;
#pragma omp simd reduction(+ : along, level)
        for (int64_t i = 0; i < d; i++) {
            float g = wide(y_grad[i]), normed = (x[i] - middle) * scale;
            weight_grad[i] += g * normed;
            bias_grad[i] += g;
            level += g * weight[i];
            along += g * weight[i] * normed;
        }
        level /= (float)d;
        along /= (float)d;
        for (int64_t i = 0; i < d; i++) {
            float normed = (x[i] - middle) * scale;
            x_grad[i] = (wide(y_grad[i]) * weight[i] - level - normed * along) * scale;
        }
    }
}

/* --- causal softmax of T scores for each of T queries, in place -------------------------------- */

/* Query t of a block sees keys 0 to t; the weights of the others are 0. */
void mpmp_causal_softmax(int64_t blocks, int64_t T, float scale, bfloat16 *scores) {
    for (int64_t row = 0; row < blocks * T; row++, scores += T) {
        int64_t seen = row % T + 1;
        float most = -INFINITY, sum = 0, exponentials[seen];
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < seen; i++) most = wide(scores[i]) > most ? wide(scores[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < seen; i++) {
            exponentials[i] = exponential((wide(scores[i]) - most) * scale);
            sum += exponentials[i];
        }
        float by = 1.0f / sum;
        for (int64_t i = 0; i < seen; i++) scores[i] = narrow(exponentials[i] * by);
        memset(scores + seen, 0, (size_t)(T - seen) * sizeof *scores);
    }
}

/* Gradients of weights become those of scores. */
void mpmp_causal_softmax_backward(int64_t blocks, int64_t T, float scale, const bfloat16 *weights,
                                  bfloat16 *grad) {
    for (int64_t row = 0; row < blocks * T; row++, weights += T, grad += T) {
        int64_t seen = row % T + 1;
        float inner = 0;
#pragma omp simd reduction(+ : inner)
        for (int64_t i = 0; i < seen; i++) inner += wide(weights[i]) * wide(grad[i]);
        for (int64_t i = 0; i < seen; i++)
            grad[i] = narrow(wide(weights[i]) * (wide(grad[i]) - inner) * scale);
        memset(grad + seen, 0, (size_t)(T - seen) * sizeof *grad);
    }
}

/* --- cross entropy of a row of v logits -------------------------------------------------------- */

/* NaN is passed over: the sum of the exponentials finds it. */
void mpmp_maximum(int64_t rows, int64_t v, const bfloat16 *logits, float *maximum) {
    for (int64_t row = 0; row < rows; row++, logits += v) {
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < v; i++) most = wide(logits[i]) > most ? wide(logits[i]) : most;
        maximum[row] = most;
    }
}

/* total = sum_j exp(logits_j - maximum) */
void mpmp_exponentials(int64_t rows, int64_t v, const bfloat16 *logits, const float *maximum, float *total) {
    for (int64_t row = 0; row < rows; row++, logits += v) {
        float sum = 0, most = maximum[row];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < v; i++) sum += exponential(wide(logits[i]) - most);
        total[row] = sum;
    }
}

/* grad_j = exp(logits_j - lse) scale, less `scale` at the target where it is in the row. */
void mpmp_cross_entropy_backward(int64_t rows, int64_t v, const bfloat16 *logits, const float *lse,
                                 const float *scale, const int64_t *target, bfloat16 *grad) {
    for (int64_t row = 0; row < rows; row++, logits += v, grad += v) {
        float by = scale[row], from = lse[row];
        for (int64_t i = 0; i < v; i++) grad[i] = narrow(exponential(wide(logits[i]) - from) * by);
        int64_t at = target[row];
        if (at >= 0 && at < v) grad[at] = narrow(exponential(wide(logits[at]) - from) * by - by);
    }
}
