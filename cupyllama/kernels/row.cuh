// A row of numbers that a block of THREADS holds in registers, and what becomes of it.
//
// A thread has SLOTS packs of WIDTH numbers: of packs 0 .. PACKS - 1 those that are threadIdx.x away
// from a multiple of THREADS.  WIDTH, PACKS and THREADS are the file's that includes this.
//
// QUANTIZE says what a row can be stored as besides: 0 nothing, E4M3 or INT8.
#include "common.cuh"

#define E4M3 1
#define INT8 2

constexpr int SLOTS = (PACKS + THREADS - 1) / THREADS;
constexpr float LEAST_SCALE = 1.17549435082e-38f;  // below it, 1 / scale would not be finite

template <typename Use>
__device__ inline void for_each_pack(Use use)
{
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const int pack = threadIdx.x + slot * THREADS;
        if (pack >= PACKS) break;
        use(slot, pack);
    }
}

template <typename Combine>
__device__ inline float over_block(float x, Combine combine)  // x: the same for a whole warp
{
    __shared__ float partial[THREADS / 32];
    __syncthreads();  // an earlier call may still be reading
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float all = partial[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) all = combine(all, partial[warp]);
    return all;
}

__device__ inline float block_sum(float x)
{
    return over_block(warp_sum(x), [](float a, float b) { return a + b; });
}

__device__ inline float block_max(float x)
{
    return over_block(warp_max(x), [](float a, float b) { return fmaxf(a, b); });
}

#if QUANTIZE == E4M3
constexpr float LARGEST = 448;

__device__ inline float magnitude(float x) { return fabsf(x); }  // fmaxf leaves NaN out

// Two numbers as e4m3, the first in the low byte; beyond 448 they are cut to it, and NaN stays NaN.
__device__ inline unsigned short to_bytes(float first, float second)
{
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
}
#elif QUANTIZE == INT8
constexpr float LARGEST = 127;

// NaN counts as infinity, which makes the scale infinite and all of the row 0.
__device__ inline float magnitude(float x) { return fabsf(x) < infinity() ? fabsf(x) : infinity(); }

// Two numbers as int8, the first in the low byte; none is beyond 127 by half a step, and NaN is 0.
__device__ inline unsigned short to_bytes(float first, float second)
{
    return (__float2int_rn(first) & 255) | (__float2int_rn(second) & 255) << 8;
}
#endif

#if QUANTIZE
// The row in 8 bits a number, and the scale by which it is to be multiplied.
__device__ inline void store_row(
    unsigned char *to, float *scale_to, const float (&row)[SLOTS][WIDTH])
{
    float peak = 0;
    for_each_pack([&](int slot, int) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) peak = fmaxf(peak, magnitude(row[slot][i]));
    });
    float scale = block_max(peak) / LARGEST;
    if (scale < LEAST_SCALE) scale = 1;
    if (threadIdx.x == 0) *scale_to = scale;
    const float inverse = 1 / scale;
    for_each_pack([&](int slot, int pack) {
        Pack<unsigned char, WIDTH> bytes;
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2) {
            const float second = i + 1 < WIDTH ? row[slot][i + 1] : 0;
            const unsigned short pair = to_bytes(row[slot][i] * inverse, second * inverse);
            bytes.x[i] = pair & 255;
            if (i + 1 < WIDTH) bytes.x[i + 1] = pair >> 8;
        }
        reinterpret_cast<Pack<unsigned char, WIDTH> *>(to)[pack] = bytes;
    });
}
#endif

__device__ inline void store_row(storage_t *to, const float (&row)[SLOTS][WIDTH])
{
    for_each_pack([&](int slot, int pack) { store(to + pack * WIDTH, row[slot]); });
}
