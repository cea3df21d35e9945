// Scores of a step to probabilities, and sums to what is written: the parts of attention_sm90.cu
// between its products.  It defines KEYS, HEAD_DIM and NUM_HEADS before.
//
// s, o: what wgmma computed for the 64 queries of a warpgroup, as hopper.cuh says; half 0 is row g
// of the warp, half 1 row g + 8.

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Keys that a query must not see get -infinity.  step: position of the first key, and the rows
// first | last << 16 of the item that see keys of it.
__device__ inline void hide(
    float (&s)[KEYS / 2], int2 step, const int (&position)[2], int row, int rows)
{
    int limit[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = row + 8 * half;
        limit[half] = at >= (step.y & 0xffff) && at < step.y >> 16 ? position[half] : -1;
        if (at >= rows) limit[half] = 0x7fffffff;  // never stored: no reason to hide
        limit[half] -= step.x;
    }
    if (!__any_sync(ALL_LANES, min(limit[0], limit[1]) < KEYS - 1)) return;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + 2 * t + i % 2 > limit[i / 2 % 2]) s[i] = -infinity();
}

// Scores to probabilities against the peak so far; what was summed before shrinks with the old one.
__device__ inline void soften(
    float (&s)[KEYS / 2], float (&shrink)[2], float (&peak)[2], float (&total)[2], float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = peak[half];
#pragma unroll
        for (int i = 2 * half; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        const float base = top == -infinity() ? 0 : top;  // a row may see no key of the first steps
        const float offset = -base * scale;
        shrink[half] = exp2_fast((peak[half] - base) * scale);  // exactly 1 where the peak stays
        float sum = 0;
#pragma unroll
        for (int i = 2 * half; i < KEYS / 2; i += 4) {
            s[i] = exp2_fast(fmaf(s[i], scale, offset));
            s[i + 1] = exp2_fast(fmaf(s[i + 1], scale, offset));
            sum += s[i] + s[i + 1];
        }
        peak[half] = top;
        total[half] = fmaf(total[half], shrink[half], sum);
    }
}

// Whether a peak of this warp moved.  Most steps move none.
__device__ inline bool moved(const float (&shrink)[2])
{
    return __any_sync(ALL_LANES, shrink[0] != 1 || shrink[1] != 1);
}

__device__ inline void rescale(float (&o)[HEAD_DIM / 2], const float (&shrink)[2])
{
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= shrink[i / 2 % 2];
}

__device__ inline void round_off(unsigned (&p)[KEYS / 16][4], const float (&s)[KEYS / 2])
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) p[i / 4][i % 4] = bits(s[2 * i], s[2 * i + 1]);
}

// Four lanes, each with two numbers of four blocks of 8 columns, change to a block each.
__device__ inline void exchange(unsigned (&x)[4])
{
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const bool upper = t & bit;
            const unsigned got = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i | bit], bit);
            (upper ? x[i] : x[i | bit]) = got;
        }
    }
}

__device__ inline void write(
    storage_t *out, const float (&o)[HEAD_DIM / 2], float (&total)[2], int row, int rows)
{
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
        total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
        const float inverse = 1 / total[half];
        storage_t *to = out + (size_t)(row + 8 * half) * NUM_HEADS * HEAD_DIM + 8 * t;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 4) {
            unsigned x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 4 * (n + i) + 2 * half;
                x[i] = bits(o[at] * inverse, o[at + 1] * inverse);
            }
            exchange(x);
            if (row + 8 * half < rows)
                *reinterpret_cast<uint4 *>(to + 8 * n) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}
