// What lies between the matrix products of a transformer in training, one pass over memory each. Called by
// attention.py, which holds the algorithm and does the products with torch.
//
// T is float or bfloat16, arithmetic is float. B rows of Tn tokens, H heads of D channels.
#include "kernels.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { MAXD = 256 };  // the largest head size (attention.py asks for it, too)

// qkv (B, Tn, 3 H D) -> q, k, v (B, H, Tp, D): q and k turned by their position's angles (cos, sin (Tn, D/2)), then
// divided by their root mean square (1 / it kept in rstd (B, Tn, 2 H)), q also scaled by the softmax's 1/sqrt(D).
// Rows from Tn to Tp are left alone.
template <class T>
static void split_fwd(const T* qkv, const T* cos, const T* sin, float eps, float scale, T* q, T* k, T* v, float* rstd,
                      I B, I Tn, I Tp, I H, I D) {
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
            T* o = (j < H ? q : k) + ((b * H + j % H) * Tp + t) * D;
#pragma omp simd
            for (I i = 0; i < D; i++) st_(o[i], u[i] * f);
        }
        for (I j = 0; j < H; j++, x += D) std::memcpy((void*)(v + ((b * H + j) * Tp + t) * D), x, D * sizeof(T));
    }
}

// Its gradient. With y = u r the normed vector and g its gradient: du = r (g - y mean(g y)), turned back.
template <class T>
static void split_bwd(const T* dq, const T* dk, const T* dv, const T* q, const T* k, const float* rstd, const T* cos,
                      const T* sin, float scale, T* dqkv, I B, I Tn, I Tp, I H, I D) {
    I h = D / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I row = 0; row < B * Tn; row++) {
        I b = row / Tn, t = row % Tn;
        T* o = dqkv + row * 3 * H * D;
        const T *co = cos + t * h, *si = sin + t * h;
        float c[MAXD / 2], s[MAXD / 2];
        for (I i = 0; i < h; i++) { c[i] = ld_(co[i]); s[i] = ld_(si[i]); }
        for (I j = 0; j < 2 * H; j++, o += D) {
            I at = ((b * H + j % H) * Tp + t) * D;
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
        for (I j = 0; j < H; j++, o += D) std::memcpy((void*)o, dv + ((b * H + j) * Tp + t) * D, D * sizeof(T));
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

// y = relu(x)^2, a NaN stays one;  backward: y again and dx = 2 relu(x) g, which may overwrite g
template <class T>
static void relu2_fwd(const T* x, T* y, I n) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (I i = 0; i < n; i++) { float v = ld_(x[i]); v = v < 0.f ? 0.f : v; st_(y[i], v * v); }
}
template <class T>
static void relu2_bwd(const T* x, const T* g, T* y, T* dx, I n) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (I i = 0; i < n; i++) {
        float v = ld_(x[i]);
        v = v < 0.f ? 0.f : v;
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

// x (n, m) -> y (m, n), both contiguous, elements of two bytes. Blocks of 32 x 32: pairs of rows become 4-byte columns,
// and a finished row is a whole cache line, which streams past the cache: rows of y are often a power of two apart,
// in one set of it. (4096 x 384: torch 3.3 ms, ordinary stores 1.3, this 0.7.)
static void transpose(const uint16_t* x, uint16_t* y, I n, I m) {
    enum { S = 32 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I j = 0; j < m; j += S)
        for (I i = 0; i < n; i += S) {
            I h = std::min<I>(S, n - i), w = std::min<I>(S, m - j);
            if (h < S || w < S) {
                for (I b = 0; b < w; b++)
                    for (I a = 0; a < h; a++) y[(j + b) * n + i + a] = x[(i + a) * m + j + b];
                continue;
            }
            uint32_t z[S / 2][S + 1];  // + 1: columns of z then spread over the sets
            for (I r = 0; r < S / 2; r++) {
                const uint16_t *u = x + (i + 2 * r) * m + j, *v = u + m;
                for (I c = 0; c < S; c++) z[r][c] = u[c] | (uint32_t)v[c] << 16;
            }
            for (I c = 0; c < S; c++) {
                alignas(64) uint32_t line[S / 2];
                uint16_t* o = y + (j + c) * n + i;
                for (I r = 0; r < S / 2; r++) line[r] = z[r][c];
#ifdef __AVX512F__
                if ((uintptr_t)o % 64 == 0) { _mm512_stream_si512((__m512i*)o, _mm512_load_si512(line)); continue; }
#endif
                std::memcpy(o, line, sizeof(line));
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole of attention in bfloat16 for heads of 64, on AMX's matrix units. Library products of this shape (inner
// dimension 64, scores written to memory and read again) reach a fifth of the units' rate; here scores stay in the
// cache as floats. Tokens are padded to Tp, a multiple of 64.
#ifdef __AMX_BF16__
enum { D = 64, TILE = 512 };  // a tile: 16 rows of 64 bytes, 512 bfloat16 or 256 floats

static void tiles_on() {
    struct { uint8_t palette = 1, start = 0, zero[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } c;
    for (int i = 0; i < 8; i++) { c.bytes[i] = 64; c.rows[i] = 16; }
    _tile_loadconfig(&c);
}

// C (rows, 16 nc) float (+)= A (rows, 32 kc) B, in blocks of 32 x 32. B's tile of inner chunk k and column block n is
// at B + k bk + n bn, its rows bs elements apart; a tile's row r holds inner indices 2r and 2r + 1 in turns, as AMX
// wants them.
static void mm(const bf16* A, I lda, const bf16* B, I bk, I bn, I bs, I rows, I kc, I nc, float* C, I ldc, bool add) {
    for (I n = 0; n < nc; n += 2)
        for (I m = 0; m < rows; m += 32) {
            float* c = C + m * ldc + n * 16;
            const bf16 *a = A + m * lda, *b = B + n * bn;
            if (add) {
                _tile_loadd(0, c, ldc * 4); _tile_loadd(1, c + 16, ldc * 4);
                _tile_loadd(2, c + 16 * ldc, ldc * 4); _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
            } else { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
            for (I k = 0; k < kc; k++, a += 32, b += bk) {
                _tile_loadd(4, a, lda * 2); _tile_loadd(6, b, bs * 2);
                _tile_loadd(7, b + bn, bs * 2); _tile_loadd(5, a + 16 * lda, lda * 2);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c, ldc * 4); _tile_stored(1, c + 16, ldc * 4);
            _tile_stored(2, c + 16 * ldc, ldc * 4); _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
        }
}

// x (n, 64) -> tiles of x^T as a right side: inner index d, columns the rows of x; tile (k, block) at (2 block + k)
static void pack_t(const bf16* x, bf16* out, I n) {
    const uint32_t* in = (const uint32_t*)x;
    uint32_t* o = (uint32_t*)out;
    for (I b = 0; b < n; b += 16)
        for (I k = 0; k < 2; k++, o += TILE / 2)
            for (I r = 0; r < 16; r++)
                for (I c = 0; c < 16; c++) o[r * 16 + c] = in[(b + c) * (D / 2) + k * 16 + r];
}
// x (n, 64) -> tiles of x as a right side: inner index the rows of x, columns d; tile (k, block) at (4 k + block)
static void pack(const bf16* x, bf16* out, I n) {
    for (I k = 0; k < n; k += 32)
        for (I b = 0; b < 4; b++, out += TILE)
            for (I r = 0; r < 16; r++)
                for (I c = 0; c < 16; c++) {
                    out[r * 32 + 2 * c] = x[(k + 2 * r) * D + b * 16 + c];
                    out[r * 32 + 2 * c + 1] = x[(k + 2 * r + 1) * D + b * 16 + c];
                }
}
static inline uint32_t pair(float a, float b) {
    bf16 x, y; st_(x, a); st_(y, b);
    return x.bits | (uint32_t)y.bits << 16;
}

// A thread's scratch memory, aligned to cache lines.
struct Scratch {
    std::vector<char> memory;
    size_t used = 0;
    explicit Scratch(size_t bytes) : memory(bytes + 64) {}
    template <class T> T* get(size_t n) {
        size_t at = ((size_t)memory.data() + used + 63) / 64 * 64 - (size_t)memory.data();
        used = at + n * sizeof(T);
        return (T*)(memory.data() + at);
    }
};

// q, k, v (BH, Tp, 64), q scaled -> out (B, Tn, H, 64), lse (BH, Tp): log of the sum of exponentials, for the backward
static void amx_fwd(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, I B, I H, I Tn, I Tp) {
    enum { R = 32 };
    I ld = Tp + 32;  // rows that aren't a power of two apart: else they'd share a few cache lines' places
#pragma omp parallel num_threads(threads)
    {
        Scratch s(4 * Tp * D + R * ld * 6 + R * D * 4 + 1024);
        bf16 *kt = s.get<bf16>(Tp * D), *vp = s.get<bf16>(Tp * D), *P = s.get<bf16>(R * ld);
        float *S = s.get<float>(R * ld), *O = s.get<float>(R * D);
        tiles_on();
#pragma omp for schedule(static)
        for (I bh = 0; bh < B * H; bh++) {
            pack_t(k + bh * Tp * D, kt, Tp);
            pack(v + bh * Tp * D, vp, Tp);
            for (I t = 0; t < Tn; t += R) {
                I L = t + R, rows = std::min<I>(R, Tn - t);
                float norm[R];
                mm(q + (bh * Tp + t) * D, D, kt, TILE, 2 * TILE, 32, R, 2, L / 16, S, ld, false);
                for (I i = 0; i < R; i++) {
                    float *x = S + i * ld, sum = 0.f;
                    bf16* p = P + i * ld;
                    I n = t + i + 1;
#pragma omp simd reduction(+ : sum)
                    for (I j = 0; j < n; j++) { float e = exp_(x[j]); sum += e; st_(p[j], e); }
                    std::memset((void*)(p + n), 0, (L - n) * sizeof(bf16));
                    lse[bh * Tp + t + i] = std::log(sum);
                    norm[i] = 1.f / sum;
                }
                mm(P, ld, vp, 4 * TILE, TILE, 32, R, L / 32, 4, O, D, false);
                for (I i = 0; i < rows; i++) {
                    bf16* o = out + ((bh / H * Tn + t + i) * H + bh % H) * D;
                    for (I d = 0; d < D; d++) st_(o[d], O[i * D + d] * norm[i]);
                }
            }
        }
        _tile_release();
    }
}

// dout as out -> dq, dk, dv (BH, Tp, 64); rows past Tn stay unwritten
static void amx_bwd(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse, bf16* dq, bf16* dk,
                    bf16* dv, I B, I H, I Tn, I Tp) {
    enum { R = 64 };
    I ld = Tp + 32;
#pragma omp parallel num_threads(threads)
    {
        Scratch s(6 * Tp * D + R * ld * 8 + R * ld * 6 + R * D * 12 + 2 * D * ld * 4 + 2048);
        bf16 *kt = s.get<bf16>(Tp * D), *kp = s.get<bf16>(Tp * D), *vt = s.get<bf16>(Tp * D);
        float *S = s.get<float>(R * ld), *dP = s.get<float>(R * ld), *dQ = s.get<float>(R * D);
        bf16 *dS = s.get<bf16>(R * ld), *g = s.get<bf16>(R * D), *gT = s.get<bf16>(R * D), *qT = s.get<bf16>(R * D);
        uint32_t *Pp = s.get<uint32_t>(R / 2 * ld), *dSp = s.get<uint32_t>(R / 2 * ld);  // rows 2r and 2r + 1 in turns
        float *dKT = s.get<float>(D * ld), *dVT = s.get<float>(D * ld);  // (64, Tp), summed over blocks of queries
        tiles_on();
#pragma omp for schedule(static)
        for (I bh = 0; bh < B * H; bh++) {
            const bf16* qh = q + bh * Tp * D;
            pack_t(k + bh * Tp * D, kt, Tp);
            pack(k + bh * Tp * D, kp, Tp);
            pack_t(v + bh * Tp * D, vt, Tp);
            std::fill(dKT, dKT + D * ld, 0.f);
            std::fill(dVT, dVT + D * ld, 0.f);
            for (I t = 0; t < Tn; t += R) {
                I L = t + R, rows = std::min<I>(R, Tn - t);
                for (I i = 0; i < R; i++) {
                    const bf16* o = dout + ((bh / H * Tn + t + i) * H + bh % H) * D;
                    if (i < rows) std::memcpy((void*)(g + i * D), o, D * sizeof(bf16));
                    else std::memset((void*)(g + i * D), 0, D * sizeof(bf16));
                }
                for (I d = 0; d < D; d++)
                    for (I i = 0; i < R; i++) { gT[d * R + i] = g[i * D + d]; qT[d * R + i] = qh[(t + i) * D + d]; }
                mm(qh + t * D, D, kt, TILE, 2 * TILE, 32, R, 2, L / 16, S, ld, false);
                mm(g, D, vt, TILE, 2 * TILE, 32, R, 2, L / 16, dP, ld, false);
                for (I i = 0; i < R; i += 2) {
                    float sum[2];
                    for (I e = 0; e < 2; e++) {
                        // P, and zero after the query. The sum is of the very products it is subtracted from: rows of
                        // dS then add up to zero, which they don't if it is computed from the rounded output.
                        float *x = S + (i + e) * ld, *y = dP + (i + e) * ld, z = lse[bh * Tp + t + i + e], a = 0.f;
                        I n = i + e < rows ? t + i + e + 1 : 0;
#pragma omp simd reduction(+ : a)
                        for (I j = 0; j < n; j++) { float p = exp_(x[j] - z); x[j] = p; a += p * y[j]; }
                        std::fill(x + n, x + L, 0.f);
                        sum[e] = a;
                    }
                    const float *x0 = S + i * ld, *x1 = x0 + ld, *y0 = dP + i * ld, *y1 = y0 + ld;
                    float s0 = sum[0], s1 = sum[1];
                    bf16 *d0 = dS + i * ld, *d1 = d0 + ld;
                    uint32_t *pp = Pp + i / 2 * ld, *dd = dSp + i / 2 * ld;
#pragma omp simd
                    for (I j = 0; j < L; j++) {
                        uint32_t u = pair(x0[j] * (y0[j] - s0), x1[j] * (y1[j] - s1));
                        pp[j] = pair(x0[j], x1[j]);
                        dd[j] = u;
                        d0[j].bits = (uint16_t)u;
                        d1[j].bits = (uint16_t)(u >> 16);
                    }
                }
                mm(dS, ld, kp, 4 * TILE, TILE, 32, R, L / 32, 4, dQ, D, false);
                for (I i = 0; i < rows * D; i++) st_(dq[(bh * Tp + t) * D + i], dQ[i]);
                mm(qT, R, (bf16*)dSp, 32 * ld, 32, 2 * ld, D, R / 32, L / 16, dKT, ld, true);
                mm(gT, R, (bf16*)Pp, 32 * ld, 32, 2 * ld, D, R / 32, L / 16, dVT, ld, true);
            }
            for (I t = 0; t < Tn; t++)
                for (I d = 0; d < D; d++) {
                    st_(dk[(bh * Tp + t) * D + d], dKT[d * ld + t]);
                    st_(dv[(bh * Tp + t) * D + d], dVT[d * ld + t]);
                }
        }
        _tile_release();
    }
}

// Ask the kernel for the tiles' registers (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); 1 if they may be used.
static int amx_init() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
static void amx_fwd(const bf16*, const bf16*, const bf16*, bf16*, float*, I, I, I, I) {}
static void amx_bwd(const bf16*, const bf16*, const bf16*, const bf16*, const float*, bf16*, bf16*, bf16*, I, I, I, I) {}
static int amx_init() { return 0; }
#endif

#define EXPORT(T, S)                                                                                                   \
    void split_fwd_##S(const T* a, const T* b, const T* c, double d, double e, T* f, T* g, T* h, float* i, I j, I k,   \
                       I l, I m, I n) { split_fwd(a, b, c, (float)d, (float)e, f, g, h, i, j, k, l, m, n); }           \
    void split_bwd_##S(const T* a, const T* b, const T* c, const T* d, const T* e, const float* f, const T* g,         \
                       const T* h, double i, T* j, I k, I l, I m, I n, I o) {                                          \
        split_bwd(a, b, c, d, e, f, g, h, (float)i, j, k, l, m, n, o); }                                               \
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
void amx_fwd_bf16(const bf16* a, const bf16* b, const bf16* c, bf16* d, float* e, I f, I g, I h, I i) {
    amx_fwd(a, b, c, d, e, f, g, h, i);
}
void amx_bwd_bf16(const bf16* a, const bf16* b, const bf16* c, const bf16* d, const float* e, bf16* f, bf16* g, bf16* h,
                  I i, I j, I k, I l) { amx_bwd(a, b, c, d, e, f, g, h, i, j, k, l); }
int amx() { return amx_init(); }
}
