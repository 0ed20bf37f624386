// What lies between the matrix products of a Mamba-2 mixer, fused: one pass over memory where eager PyTorch makes ten.
//
// Called by fused.py, which holds the algorithm and does every matrix product with torch. Letters are those of
// ssd.py: b sequences of T tokens, cut into c chunks of Q (Tp = c Q >= T; rows past T are zero), H heads of P channels,
// E = H P, state size N, one group. Tensors are T (float or bfloat16); per-token scalars (bc, H, Q) are float.
// `zx` is the output of in_proj, rows of ld elements: z at column 0, the convolution's input at column E.
#include "kernels.h"

enum { W = 4, BLK = 64 };  // taps of the convolution; channels its backward keeps in registers

// xbc = silu(bias + sum_k w[k] x_{t-3+k});  w (4, C);  past (b, 3, C) or null
template <class T>
static void conv_fwd(const T* zx, I ld, const float* w, const float* bias, const T* past, T* out, I b, I Tn, I Tp, I C) {
    I TB = 64, nt = (Tp + TB - 1) / TB;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (I i = 0; i < b; i++)
        for (I tb = 0; tb < nt; tb++)
            for (I t = tb * TB; t < std::min(Tp, (tb + 1) * TB); t++) {
                T* o = out + (i * Tp + t) * C;
                if (t >= Tn) { std::memset((void*)o, 0, C * sizeof(T)); continue; }
                static const std::vector<T> zero(1 << 16, T());
                const T* r[W];
                for (I k = 0; k < W; k++) {
                    I s = t - (W - 1) + k;
                    r[k] = s >= 0 ? zx + (i * Tn + s) * ld : past ? past + (i * (W - 1) + s + W - 1) * C : zero.data();
                }
                const T *r0 = r[0], *r1 = r[1], *r2 = r[2], *r3 = r[3];
#pragma omp simd
                for (I ch = 0; ch < C; ch++) {
                    float a = bias[ch] + w[ch] * ld_(r0[ch]) + w[C + ch] * ld_(r1[ch]) + w[2 * C + ch] * ld_(r2[ch]) +
                              w[3 * C + ch] * ld_(r3[ch]);
                    st_(o[ch], a * sigmoid_(a));
                }
            }
}

// gradient of conv_fwd (no past): dxbc (b, Tp, C) -> dzx (rows of ld), dw (b, 4, C), dbias (b, C)
template <class T>
static void conv_bwd(const T* dxbc, const T* zx, I ld, const float* w, const float* bias, T* dzx, float* dw, float* db,
                     I b, I Tn, I Tp, I C) {
    I nb = (C + BLK - 1) / BLK;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (I i = 0; i < b; i++)
        for (I k = 0; k < nb; k++) {
            I c0 = k * BLK, n = std::min<I>(BLK, C - c0);
            float wk[W][BLK] = {}, bk[BLK] = {}, gw[W][BLK] = {}, gb[BLK] = {};
            float xr[W][BLK] = {}, gr[W][BLK] = {};  // the last four inputs and pre-activation gradients, newest at 3
            for (I j = 0; j < n; j++) {
                bk[j] = bias[c0 + j];
                for (I q = 0; q < W; q++) wk[q][j] = w[q * C + c0 + j];
            }
            bool full = n == BLK;
            for (I t = 0; t < Tn + W - 1; t++) {
                const T* x = zx + (i * Tn + std::min(t, Tn - 1)) * ld + c0;
                const T* g = dxbc + (i * Tp + std::min(t, Tn - 1)) * C + c0;
                float live = t < Tn ? 1.f : 0.f, xn[BLK] = {}, gn[BLK] = {};
                if (full) for (I j = 0; j < BLK; j++) { xn[j] = ld_(x[j]); gn[j] = live * ld_(g[j]); }
                else for (I j = 0; j < n; j++) { xn[j] = ld_(x[j]); gn[j] = live * ld_(g[j]); }
                float o[BLK];
#pragma omp simd
                for (I j = 0; j < BLK; j++) {
                    float x0 = xr[1][j], x1 = xr[2][j], x2 = xr[3][j], x3 = xn[j];
                    xr[1][j] = x1; xr[2][j] = x2; xr[3][j] = x3;
                    float a = bk[j] + wk[0][j] * x0 + wk[1][j] * x1 + wk[2][j] * x2 + wk[3][j] * x3;
                    float s = sigmoid_(a), d = gn[j] * s * (1.f + a * (1.f - s));
                    gw[0][j] += d * x0; gw[1][j] += d * x1; gw[2][j] += d * x2; gw[3][j] += d * x3;
                    gb[j] += d;
                    float d0 = gr[1][j], d1 = gr[2][j], d2 = gr[3][j];  // gradients at t-3, t-2, t-1
                    gr[1][j] = d1; gr[2][j] = d2; gr[3][j] = d;
                    o[j] = wk[3][j] * d0 + wk[2][j] * d1 + wk[1][j] * d2 + wk[0][j] * d;  // input t-3 reaches t-3..t
                }
                if (t >= W - 1) {
                    T* dz = dzx + (i * Tn + t - (W - 1)) * ld + c0;
                    if (full) for (I j = 0; j < BLK; j++) st_(dz[j], o[j]);
                    else for (I j = 0; j < n; j++) st_(dz[j], o[j]);
                }
            }
            for (I j = 0; j < n; j++) {
                db[i * C + c0 + j] = gb[j];
                for (I q = 0; q < W; q++) dw[(i * W + q) * C + c0 + j] = gw[q][j];
            }
        }
}

// M[i, j<=i] = exp(cs_i + w_j) CB[i, j];  xp = x by head (bc, H, Q, P);  xd = x * to_end (bc, Q, E).  w = log dt - cs
template <class T>
static void chunk_fwd(const T* x, I C, const T* CB, const float* cs, const float* w, const float* to_end, T* M, T* xp,
                      T* xd, I bc, I H, I Q, I P) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < bc; k++) {
        for (I i = 0; i < Q; i++)
            for (I h = 0; h < H; h++) {
                const T* xi = x + (k * Q + i) * C + h * P;
                T *d = xd + ((k * Q + i) * H + h) * P, *o = xp + ((k * H + h) * Q + i) * P;
                float e = to_end[(k * H + h) * Q + i];
#pragma omp simd
                for (I p = 0; p < P; p++) { o[p] = xi[p]; st_(d[p], e * ld_(xi[p])); }
            }
        for (I h = 0; M && h < H; h++) {
            const float *u = cs + (k * H + h) * Q, *v = w + (k * H + h) * Q;
            for (I i = 0; i < Q; i++) {
                const T* cb = CB + (k * Q + i) * Q;
                T* m = M + ((k * H + h) * Q + i) * Q;
                float ui = u[i];
                I end = std::min(Q, (i | 15) + 1);
#pragma omp simd
                for (I j = 0; j < end; j++) {
                    float r = exp_(j <= i ? ui + v[j] : -87.f) * ld_(cb[j]);
                    st_(m[j], j <= i ? r : 0.f);
                }
                if (end < Q) std::memset((void*)(m + end), 0, (Q - end) * sizeof(T));
            }
        }
    }
}

// E = dM * M;  rows_i = sum_j E, cols_j = sum_i E;  dCB = sum_h dM * exp(cs_i + w_j)
template <class T>
static void mask_bwd(const T* dM, const T* CB, const float* cs, const float* w, T* dCB, float* rows, float* cols, I bc,
                     I H, I Q) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < bc; k++) {
        std::vector<float> acc(Q * Q, 0.f);
        for (I h = 0; h < H; h++) {
            const float *u = cs + (k * H + h) * Q, *v = w + (k * H + h) * Q;
            float *rw = rows + (k * H + h) * Q, *cl = cols + (k * H + h) * Q;
            std::fill(cl, cl + Q, 0.f);
            for (I i = 0; i < Q; i++) {
                const T *d = dM + ((k * H + h) * Q + i) * Q, *cb = CB + (k * Q + i) * Q;
                float* a = acc.data() + i * Q;
                float ui = u[i], sum = 0.f;
                I end = std::min(Q, (i | 15) + 1);
#pragma omp simd reduction(+ : sum)
                for (I j = 0; j < end; j++) {
                    float z = j <= i ? ui + v[j] : -87.f;
                    float l = exp_(z);
                    float g = j <= i ? ld_(d[j]) * l : 0.f;
                    float ee = g * ld_(cb[j]);
                    a[j] += g; cl[j] += ee; sum += ee;
                }
                rw[i] = sum;
            }
        }
        for (I n = 0; n < Q * Q; n++) st_(dCB[k * Q * Q + n], acc[n]);
    }
}

// S_in[c] = S; S = decay[c] S + added[c].  S (b, N, E) float in and out; added, S_in (b, c, N, E); decay (b, c, H)
template <class T>
static void carry_fwd(const T* added, const float* decay, float* S, T* S_in, I b, I c, I H, I N, I P) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (I i = 0; i < b; i++)
        for (I n = 0; n < N; n++)
            for (I k = 0; k < c; k++)
                for (I h = 0; h < H; h++) {
                    I off = (((i * c + k) * N + n) * H + h) * P;
                    const T* a = added + off;
                    T* o = S_in + off;
                    float *s = S + ((i * N + n) * H + h) * P, d = decay[(i * c + k) * H + h];
#pragma omp simd
                    for (I p = 0; p < P; p++) { st_(o[p], s[p]); s[p] = d * s[p] + ld_(a[p]); }
                }
}

// backward of carry_fwd: dadded, ddecay (b, c, N, H);  dS (b, N, E) float is the final state's gradient, then S's
template <class T>
static void carry_bwd(const T* dS_in, const T* S_in, const float* decay, float* dS, T* dadded, float* ddecay, I b, I c,
                      I H, I N, I P) {
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
    for (I i = 0; i < b; i++)
        for (I n = 0; n < N; n++)
            for (I k = c - 1; k >= 0; k--)
                for (I h = 0; h < H; h++) {
                    I off = (((i * c + k) * N + n) * H + h) * P;
                    const T *di = dS_in + off, *si = S_in + off;
                    T* o = dadded + off;
                    float *g = dS + ((i * N + n) * H + h) * P, d = decay[(i * c + k) * H + h], sum = 0.f;
#pragma omp simd reduction(+ : sum)
                    for (I p = 0; p < P; p++) {
                        st_(o[p], g[p]);
                        sum += g[p] * ld_(si[p]);
                        g[p] = d * g[p] + ld_(di[p]);
                    }
                    ddecay[((i * c + k) * N + n) * H + h] = sum;
                }
}

// y = yd + from_start * y_in + D x;  out = rms_norm(y silu(z)) * nw.  yd (bc, H, Q, P), y_in (bc, Q, E), y may be null
template <class T>
static void out_fwd(const T* yd, const T* y_in, const float* from, const T* x, I C, const float* D, const T* zx, I ld,
                    const float* nw, float eps, T* y, float* rstd, T* out, I b, I c, I Tn, I H, I Q, I P) {
    I E = H * P;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < b * c; k++) {
        std::vector<float> g(E);
        for (I i = 0; i < Q; i++) {
            I t = (k % c) * Q + i, row = (k / c) * Tn + t;
            if (t >= Tn) break;
            float sum = 0.f;
            for (I h = 0; h < H; h++) {
                const T *a = yd + ((k * H + h) * Q + i) * P, *bb = y_in + ((k * Q + i) * H + h) * P;
                const T *xx = x + (k * Q + i) * C + h * P, *z = zx + row * ld + h * P;
                T* yo = y ? y + row * E + h * P : nullptr;
                float f = from[(k * H + h) * Q + i], d = D[h];
                float* gh = g.data() + h * P;
#pragma omp simd reduction(+ : sum)
                for (I p = 0; p < P; p++) {
                    float v = ld_(a[p]) + f * ld_(bb[p]) + d * ld_(xx[p]);
                    if (yo) st_(yo[p], v);
                    float zz = ld_(z[p]);
                    float q = v * zz * sigmoid_(zz);
                    gh[p] = q;
                    sum += q * q;
                }
            }
            float r = 1.f / std::sqrt(sum / E + eps);
            if (rstd) rstd[row] = r;
            T* o = out + row * E;
#pragma omp simd
            for (I p = 0; p < E; p++) st_(o[p], g[p] * r * nw[p]);
        }
    }
}

// backward of out_fwd: dz into dzx, dy by head (dyp), dy * from_start (z1), per-token sums dfrom = dy.y_in and
// dD = dy.x, and dnw (bc, E)
template <class T>
static void out_bwd(const T* dout, const T* y, const T* zx, I ld, const float* nw, const float* rstd, const T* x, I C,
                    const T* y_in, const float* from, T* dzx, T* dyp, T* z1, float* dfrom, float* dD, float* dnw, I b,
                    I c, I Tn, I H, I Q, I P) {
    I E = H * P;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < b * c; k++) {
        float* gw = dnw + k * E;
        std::fill(gw, gw + E, 0.f);
        std::vector<float> sg(E);
        for (I i = 0; i < Q; i++) {
            I t = (k % c) * Q + i, row = (k / c) * Tn + t;
            if (t >= Tn) {
                std::memset((void*)(z1 + (k * Q + i) * E), 0, E * sizeof(T));
                for (I h = 0; h < H; h++) {
                    std::memset((void*)(dyp + ((k * H + h) * Q + i) * P), 0, P * sizeof(T));
                    dfrom[(k * H + h) * Q + i] = dD[(k * H + h) * Q + i] = 0.f;
                }
                continue;
            }
            const T *go = dout + row * E, *yy = y + row * E, *z = zx + row * ld;
            T* dz = dzx + row * ld;
            float r = rstd[row], c1 = 0.f;
            float* s = sg.data();
#pragma omp simd reduction(+ : c1)
            for (I p = 0; p < E; p++) {
                float zz = ld_(z[p]), q = sigmoid_(zz), n = ld_(yy[p]) * zz * q * r, gn = ld_(go[p]) * n;
                s[p] = q;
                gw[p] += gn;
                c1 += gn * nw[p];
            }
            c1 /= E;
            for (I h = 0; h < H; h++) {
                const T *xx = x + (k * Q + i) * C + h * P, *yi = y_in + ((k * Q + i) * H + h) * P;
                T *o1 = dyp + ((k * H + h) * Q + i) * P, *o2 = z1 + ((k * Q + i) * H + h) * P;
                float f = from[(k * H + h) * Q + i], s1 = 0.f, s2 = 0.f;
                const T *goh = go + h * P, *yh = yy + h * P, *zh = z + h * P;
                const float *sh = s + h * P, *wh = nw + h * P;
                T* dzh = dz + h * P;
#pragma omp simd reduction(+ : s1, s2)
                for (I p = 0; p < P; p++) {
                    float zz = ld_(zh[p]), q = sh[p], v = ld_(yh[p]), si = zz * q;
                    float dg = (ld_(goh[p]) * wh[p] - v * si * r * c1) * r;
                    st_(dzh[p], dg * v * q * (1.f + zz * (1.f - q)));
                    float dy = dg * si;
                    st_(o1[p], dy);
                    st_(o2[p], f * dy);
                    s1 += dy * ld_(yi[p]);
                    s2 += dy * ld_(xx[p]);
                }
                dfrom[(k * H + h) * Q + i] = s1;
                dD[(k * H + h) * Q + i] = s2;
            }
        }
    }
}

// dx = dxp + to_end * dxd + D dy, into the first E columns of dxbc (rows of C);  dto = x.dxd per token
template <class T>
static void x_bwd(const T* dxp, const T* dxd, const float* to_end, const T* dyp, const float* D, const T* x, I C,
                  T* dxbc, float* dto, I bc, I H, I Q, I P) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < bc; k++)
        for (I i = 0; i < Q; i++)
            for (I h = 0; h < H; h++) {
                const T *a = dxp + ((k * H + h) * Q + i) * P, *g = dyp + ((k * H + h) * Q + i) * P;
                const T *e = dxd + ((k * Q + i) * H + h) * P, *xx = x + (k * Q + i) * C + h * P;
                T* o = dxbc + (k * Q + i) * C + h * P;
                float f = to_end[(k * H + h) * Q + i], d = D[h], s = 0.f;
#pragma omp simd reduction(+ : s)
                for (I p = 0; p < P; p++) {
                    float q = ld_(e[p]);
                    st_(o[p], ld_(a[p]) + f * q + d * ld_(g[p]));
                    s += q * ld_(xx[p]);
                }
                dto[(k * H + h) * Q + i] = s;
            }
}

// One token: everything between the projections. past (b, 3, C) and S (b, H, P, N) float are updated in place; w (C, 4)
template <class T>
static void step(const T* zx, I ld, const float* w, const float* bias, const float* dt_bias, const float* A_log,
                 const float* D, const float* nw, float eps, T* past, float* S, T* out, I b, I H, I P, I N) {
    I E = H * P, C = E + 2 * N;
    std::vector<float> xs(b * C), g(b * E);
    for (I i = 0; i < b; i++) {
        const T* in = zx + i * ld + E;
        T *p0 = past + i * (W - 1) * C, *p1 = p0 + C, *p2 = p1 + C;
        float* o = xs.data() + i * C;
#pragma omp simd
        for (I c = 0; c < C; c++) {
            float a = bias[c] + w[c * W] * ld_(p0[c]) + w[c * W + 1] * ld_(p1[c]) + w[c * W + 2] * ld_(p2[c]) +
                      w[c * W + 3] * ld_(in[c]);
            o[c] = a * sigmoid_(a);
            p0[c] = p1[c]; p1[c] = p2[c]; p2[c] = in[c];
        }
    }
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static) if (b * E * N > (1 << 18))
    for (I i = 0; i < b; i++)
        for (I h = 0; h < H; h++) {
            const float *x = xs.data() + i * C + h * P, *B = xs.data() + i * C + E, *Cm = B + N;
            float raw = ld_(zx[i * ld + E + C + h]) + dt_bias[h];
            float dt = raw > 20.f ? raw : std::log1p(std::exp(raw)), a = std::exp(-dt * std::exp(A_log[h]));
            for (I p = 0; p < P; p++) {
                float *s = S + ((i * H + h) * P + p) * N, xd = x[p] * dt, y = 0.f;
#pragma omp simd reduction(+ : y)
                for (I n = 0; n < N; n++) { s[n] = a * s[n] + xd * B[n]; y += s[n] * Cm[n]; }
                float z = ld_(zx[i * ld + h * P + p]);
                g[i * E + h * P + p] = (y + D[h] * x[p]) * z * sigmoid_(z);
            }
        }
    for (I i = 0; i < b; i++) {
        const float* v = g.data() + i * E;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (I p = 0; p < E; p++) sum += v[p] * v[p];
        float r = 1.f / std::sqrt(sum / E + eps);
#pragma omp simd
        for (I p = 0; p < E; p++) st_(out[i * E + p], v[p] * r * nw[p]);
    }
}

// out = x * rstd, rstd = 1 / sqrt(mean x^2 + eps), by rows of E;  backward: dx = rstd (g - xhat mean(g xhat))
template <class T>
static void rms_fwd(const T* x, float eps, T* out, float* rstd, I rows, I E) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < rows; k++) {
        const T* a = x + k * E;
        T* o = out + k * E;
        float s = 0.f;
#pragma omp simd reduction(+ : s)
        for (I p = 0; p < E; p++) { float v = ld_(a[p]); s += v * v; }
        float r = rstd[k] = 1.f / std::sqrt(s / E + eps);
#pragma omp simd
        for (I p = 0; p < E; p++) st_(o[p], ld_(a[p]) * r);
    }
}
template <class T>
static void rms_bwd(const T* g, const T* x, const float* rstd, T* dx, I rows, I E) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (I k = 0; k < rows; k++) {
        const T *a = x + k * E, *d = g + k * E;
        T* o = dx + k * E;
        float r = rstd[k], s = 0.f;
#pragma omp simd reduction(+ : s)
        for (I p = 0; p < E; p++) s += ld_(a[p]) * ld_(d[p]);
        float m = s * r * r / E;
#pragma omp simd
        for (I p = 0; p < E; p++) st_(o[p], r * (ld_(d[p]) - m * ld_(a[p])));
    }
}

#define EXPORT(T, S)                                                                                                   \
    extern "C" {                                                                                                       \
    void conv_fwd_##S(const T* a, I b, const float* c, const float* d, const T* e, T* f, I g, I h, I i, I j) {         \
        conv_fwd(a, b, c, d, e, f, g, h, i, j); }                                                                      \
    void conv_bwd_##S(const T* a, const T* b, I c, const float* d, const float* e, T* f, float* g, float* h, I i, I j, \
                      I k, I l) { conv_bwd(a, b, c, d, e, f, g, h, i, j, k, l); }                                      \
    void chunk_fwd_##S(const T* a, I b, const T* c, const float* d, const float* e, const float* f, T* g, T* h, T* i,  \
                       I j, I k, I l, I m) { chunk_fwd(a, b, c, d, e, f, g, h, i, j, k, l, m); }                       \
    void mask_bwd_##S(const T* a, const T* b, const float* c, const float* d, T* e, float* f, float* g, I h, I i,      \
                      I j) { mask_bwd(a, b, c, d, e, f, g, h, i, j); }                                                 \
    void carry_fwd_##S(const T* a, const float* b, float* c, T* d, I e, I f, I g, I h, I i) {                          \
        carry_fwd(a, b, c, d, e, f, g, h, i); }                                                                        \
    void carry_bwd_##S(const T* a, const T* b, const float* c, float* d, T* e, float* f, I g, I h, I i, I j, I k) {    \
        carry_bwd(a, b, c, d, e, f, g, h, i, j, k); }                                                                  \
    void out_fwd_##S(const T* a, const T* b, const float* c, const T* d, I e, const float* f, const T* g, I h,         \
                     const float* i, double j, T* k, float* l, T* m, I n, I o, I p, I q, I r, I s) {                   \
        out_fwd(a, b, c, d, e, f, g, h, i, (float)j, k, l, m, n, o, p, q, r, s); }                                     \
    void out_bwd_##S(const T* a, const T* b, const T* c, I d, const float* e, const float* f, const T* g, I h,         \
                     const T* i, const float* j, T* k, T* l, T* m, float* n, float* o, float* p, I q, I r, I s, I t,   \
                     I u, I v) { out_bwd(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v); }          \
    void x_bwd_##S(const T* a, const T* b, const float* c, const T* d, const float* e, const T* f, I g, T* h,          \
                   float* i, I j, I k, I l, I m) { x_bwd(a, b, c, d, e, f, g, h, i, j, k, l, m); }                     \
    void step_##S(const T* a, I b, const float* c, const float* d, const float* e, const float* f, const float* g,     \
                  const float* h, double i, T* j, float* k, T* l, I m, I n, I o, I p) {                                \
        step(a, b, c, d, e, f, g, h, (float)i, j, k, l, m, n, o, p); }                                                 \
    void rms_fwd_##S(const T* a, double b, T* c, float* d, I e, I f) { rms_fwd(a, (float)b, c, d, e, f); }             \
    void rms_bwd_##S(const T* a, const T* b, const float* c, T* d, I e, I f) { rms_bwd(a, b, c, d, e, f); }            \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
