// What lies between the matrix products of a transformer in training, one pass over memory each. Called by
// attention.py, which holds the algorithm and does the products with torch.
//
// T is float or bfloat16, arithmetic is float. B rows of Tn tokens, H heads of D channels.
#include "kernels.h"

enum { MAXD = 256 };  // the largest head size (attention.py asks for it, too)

// qkv (B, Tn, 3 H D) -> q, k, v (B, H, Tn, D): q and k turned by their position's angles (cos, sin (Tn, D/2)), then
// divided by their root mean square (1 / it kept in rstd (B, Tn, 2 H)), q also scaled by the softmax's 1/sqrt(D).
template <class T>
static void split_fwd(const T* qkv, const T* cos, const T* sin, float eps, float scale, T* q, T* k, T* v, float* rstd,
                      I B, I Tn, I H, I D) {
    I h = D / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I row = 0; row < B * Tn; row++) {
        I b = row / Tn, t = row % Tn;
        const T *x = qkv + row * 3 * H * D, *co = cos + t * h, *si = sin + t * h;
        float u[MAXD], c[MAXD / 2], s[MAXD / 2];
        for (I i = 0; i < h; i++) { c[i] = ld_(co[i]); s[i] = ld_(si[i]); }
        for (I j = 0; j < 2 * H; j++, x += D) {
            float sum = 0.f;
#pragma omp simd reduction(+ : sum)
            for (I i = 0; i < h; i++) {
                float a = ld_(x[i]), e = ld_(x[h + i]);
                float m = a * c[i] - e * s[i], n = a * s[i] + e * c[i];
                u[i] = m; u[h + i] = n;
                sum += m * m + n * n;
            }
            float r = rstd[row * 2 * H + j] = 1.f / std::sqrt(sum / D + eps), f = j < H ? r * scale : r;
            T* o = (j < H ? q : k) + ((b * H + j % H) * Tn + t) * D;
#pragma omp simd
            for (I i = 0; i < D; i++) st_(o[i], u[i] * f);
        }
        for (I j = 0; j < H; j++, x += D) std::memcpy((void*)(v + ((b * H + j) * Tn + t) * D), x, D * sizeof(T));
    }
}

// Its gradient. With y = u r the normed vector and g its gradient: du = r (g - y mean(g y)), turned back.
template <class T>
static void split_bwd(const T* dq, const T* dk, const T* dv, const T* q, const T* k, const float* rstd, const T* cos,
                      const T* sin, float scale, T* dqkv, I B, I Tn, I H, I D) {
    I h = D / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I row = 0; row < B * Tn; row++) {
        I b = row / Tn, t = row % Tn;
        T* o = dqkv + row * 3 * H * D;
        const T *co = cos + t * h, *si = sin + t * h;
        float c[MAXD / 2], s[MAXD / 2];
        for (I i = 0; i < h; i++) { c[i] = ld_(co[i]); s[i] = ld_(si[i]); }
        for (I j = 0; j < 2 * H; j++, o += D) {
            I at = ((b * H + j % H) * Tn + t) * D;
            const T *g = (j < H ? dq : dk) + at, *y = (j < H ? q : k) + at;
            float sum = 0.f, f = j < H ? scale : 1.f, r = rstd[row * 2 * H + j];
#pragma omp simd reduction(+ : sum)
            for (I i = 0; i < D; i++) sum += ld_(g[i]) * ld_(y[i]);  // q's scale and its gradient's cancel
            float rg = r * f, ry = r * sum / D / f;
#pragma omp simd
            for (I i = 0; i < h; i++) {
                float m = rg * ld_(g[i]) - ry * ld_(y[i]), n = rg * ld_(g[h + i]) - ry * ld_(y[h + i]);
                st_(o[i], m * c[i] + n * s[i]);
                st_(o[h + i], n * c[i] - m * s[i]);
            }
        }
        for (I j = 0; j < H; j++, o += D) std::memcpy((void*)o, dv + ((b * H + j) * Tn + t) * D, D * sizeof(T));
    }
}

// Causal softmax in place: S (H, R, L) scores of queries t0..t0+R-1 against keys 0..L-1 -> P, zero after the query.
// lse (H, rows of Tn, from t0) is kept for the backward. No maximum is subtracted: scores of normed vectors stay
// within sqrt(D) <= 16.
template <class T>
static void softmax_fwd(T* S, float* lse, I H, I R, I L, I t0, I Tn) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < H * R; k++) {
        static thread_local std::vector<float> buffer;
        buffer.resize(L);
        T* s = S + k * L;
        float *p = buffer.data(), sum = 0.f;
        I n = t0 + k % R + 1;
#pragma omp simd reduction(+ : sum)
        for (I j = 0; j < n; j++) { float e = exp_(ld_(s[j])); p[j] = e; sum += e; }
        float r = 1.f / sum;
        lse[k / R * Tn + k % R] = std::log(sum);
#pragma omp simd
        for (I j = 0; j < n; j++) st_(s[j], p[j] * r);
        std::memset((void*)(s + n), 0, (L - n) * sizeof(T));
    }
}

// S -> P and dP -> dS = P (dP - sum(P dP)), both in place. The sum is taken over the products it is subtracted from,
// in float: rows of dS then add up to zero, which they don't if it is computed from the rounded output.
template <class T>
static void softmax_bwd(T* S, T* dP, const float* lse, I H, I R, I L, I t0, I Tn) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < H * R; k++) {
        static thread_local std::vector<float> buffer;
        buffer.resize(L);
        T *s = S + k * L, *d = dP + k * L;
        float *p = buffer.data(), sum = 0.f, z = lse[k / R * Tn + k % R];
        I n = t0 + k % R + 1;
#pragma omp simd reduction(+ : sum)
        for (I j = 0; j < n; j++) { float e = exp_(ld_(s[j]) - z); p[j] = e; sum += e * ld_(d[j]); }
#pragma omp simd
        for (I j = 0; j < n; j++) { st_(s[j], p[j]); st_(d[j], p[j] * (ld_(d[j]) - sum)); }
        std::memset((void*)(s + n), 0, (L - n) * sizeof(T));
        std::memset((void*)(d + n), 0, (L - n) * sizeof(T));
    }
}

// y = relu(x)^2;  backward: y again and dx = 2 relu(x) g, which may overwrite g
template <class T>
static void relu2_fwd(const T* x, T* y, I n) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (I i = 0; i < n; i++) { float v = ld_(x[i]); v = v > 0.f ? v : 0.f; st_(y[i], v * v); }
}
template <class T>
static void relu2_bwd(const T* x, const T* g, T* y, T* dx, I n) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (I i = 0; i < n; i++) {
        float v = ld_(x[i]);
        v = v > 0.f ? v : 0.f;
        st_(dx[i], 2.f * v * ld_(g[i]));
        st_(y[i], v * v);
    }
}

// Cross-entropy of logits (n, V) in place: they become its gradient, softmax - onehot; loss (n). Both are computed from
// the sum over the *other* classes, so that nothing cancels where the target's probability is near 1.
template <class T>
static void cross_entropy(T* logits, const int64_t* target, float* loss, I n, I V) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < n; k++) {
        static thread_local std::vector<float> buffer;
        buffer.resize(V);
        T* s = logits + k * V;
        float *p = buffer.data(), top = ld_(s[0]), sum = 0.f;
        I t = target[k];
#pragma omp simd reduction(max : top)
        for (I j = 0; j < V; j++) { float v = ld_(s[j]); top = v > top ? v : top; }
#pragma omp simd
        for (I j = 0; j < V; j++) p[j] = exp_(ld_(s[j]) - top);
        float own = p[t];
        p[t] = 0.f;
#pragma omp simd reduction(+ : sum)
        for (I j = 0; j < V; j++) sum += p[j];
        float r = 1.f / (sum + own);
        // own is at least e^-87, at worst clamped there: then the logits themselves say how far it is
        loss[k] = own > 1e-30f ? std::log1p(sum / own) : std::log(sum) - (ld_(s[t]) - top);
#pragma omp simd
        for (I j = 0; j < V; j++) st_(s[j], p[j] * r);
        st_(s[t], -sum * r);
    }
}

// x (n, m) -> y (m, n), 2-byte elements only: torch takes 18 ms for 4096 x 1536, this 3
static void transpose(const uint16_t* x, uint16_t* y, I n, I m) {
    enum { S = 32 };  // a block of 32 x 32: its rows and columns are a cache line each
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I i = 0; i < n; i += S)
        for (I j = 0; j < m; j += S) {
            I h = std::min<I>(S, n - i), w = std::min<I>(S, m - j);
            if (h == S && w == S) {
                for (I b = 0; b < S; b++)
                    for (I a = 0; a < S; a++) y[(j + b) * n + i + a] = x[(i + a) * m + j + b];
            } else {
                for (I b = 0; b < w; b++)
                    for (I a = 0; a < h; a++) y[(j + b) * n + i + a] = x[(i + a) * m + j + b];
            }
        }
}

#define EXPORT(T, S)                                                                                                   \
    void split_fwd_##S(const T* a, const T* b, const T* c, double d, double e, T* f, T* g, T* h, float* i, I j, I k,   \
                       I l, I m) { split_fwd(a, b, c, (float)d, (float)e, f, g, h, i, j, k, l, m); }                   \
    void split_bwd_##S(const T* a, const T* b, const T* c, const T* d, const T* e, const float* f, const T* g,         \
                       const T* h, double i, T* j, I k, I l, I m, I n) {                                               \
        split_bwd(a, b, c, d, e, f, g, h, (float)i, j, k, l, m, n); }                                                  \
    void softmax_fwd_##S(T* a, float* b, I c, I d, I e, I f, I g) { softmax_fwd(a, b, c, d, e, f, g); }                \
    void softmax_bwd_##S(T* a, T* b, const float* c, I d, I e, I f, I g, I h) {                                        \
        softmax_bwd(a, b, c, d, e, f, g, h); }                                                                         \
    void relu2_fwd_##S(const T* a, T* b, I c) { relu2_fwd(a, b, c); }                                                  \
    void relu2_bwd_##S(const T* a, const T* b, T* c, T* d, I e) { relu2_bwd(a, b, c, d, e); }                          \
    void cross_entropy_##S(T* a, const int64_t* b, float* c, I d, I e) { cross_entropy(a, b, c, d, e); }
extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)
void transpose_bf16(const uint16_t* x, uint16_t* y, I n, I m) { transpose(x, y, n, m); }
}
