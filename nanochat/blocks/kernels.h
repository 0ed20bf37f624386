// What every kernel file starts with: bfloat16, a vectorisable exp, the number of threads. Compiled into each library.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 { uint16_t bits; };

static inline float ld_(float v) { return v; }
static inline float ld_(bf16 v) { uint32_t u = (uint32_t)v.bits << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline void st_(float& d, float v) { d = v; }
static inline void st_(bf16& d, float v) {  // round to nearest even; a NaN stays a NaN
    uint32_t u; std::memcpy(&u, &v, 4);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    d.bits = (uint16_t)(v != v ? 0x7fc0u : r);
}

// exp after Cephes (relative error 1e-7), written so that compilers vectorise it. NaN in, NaN out.
static inline float exp_(float x) {
    float y = x < -87.f ? -87.f : x;
    y = y > 88.f ? 88.f : y;
    float n = std::floor(y * 1.44269504f + 0.5f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    int32_t e = ((int32_t)n + 127) << 23;
    float s; std::memcpy(&s, &e, 4);
    return p * s;
}
static inline float sigmoid_(float x) { return 1.f / (1.f + exp_(-x)); }

typedef long I;
static int threads = 1;
extern "C" void set_threads(int n) { threads = n; }  // torch's own setting; OpenMP's is per calling thread
