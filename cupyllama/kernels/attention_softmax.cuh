// Scores of a step to probabilities, and sums to what is written: the parts of attention_sm90.cu
// between its products.  It defines Rows and Step before.
//
// s, o: what wgmma computed for the 64 queries of a warpgroup, as hopper.cuh says; half 0 is row g
// of the warp, half 1 row g + 8.  COUNT: columns of s, of which a step may have fewer than KEYS.

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Keys that a query must not see get -infinity.
template <int COUNT>
__device__ inline void hide(float (&s)[COUNT / 2], const Step &step, const Rows &rows)
{
    int limit[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = rows.row + 8 * half;
        const bool sees = at >= step.first() && at < step.end();
        limit[half] = (sees ? rows.position[half] : -1) - step.position;
        if (at >= rows.count) limit[half] = KEYS;  // never stored: no reason to hide
    }
    if (!__any_sync(ALL_LANES, min(limit[0], limit[1]) < COUNT - 1)) return;
#pragma unroll
    for (int half = 0; half < 2; half++) limit[half] -= threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++)
        if (i / 4 * 8 + i % 2 > limit[i / 2 % 2]) s[i] = -infinity();
}

// Scores to probabilities against the peak so far; what was summed before shrinks with the old one.
// Both halves side by side, and two chains of maxima for each, keep the units busy.
template <int COUNT>
__device__ inline void soften(
    float (&s)[COUNT / 2], float (&shrink)[2], float (&peak)[2], float (&total)[2], float scale)
{
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float a = peak[half], b = s[2 * half];
#pragma unroll
        for (int i = 2 * half; i < COUNT / 2; i += 8) {
            a = fmaxf(a, fmaxf(s[i], s[i + 1]));
            b = fmaxf(b, fmaxf(s[i + 4], s[i + 5]));
        }
        top[half] = fmaxf(a, b);
    }
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2)
#pragma unroll
        for (int half = 0; half < 2; half++)
            top[half] = fmaxf(top[half], __shfl_xor_sync(ALL_LANES, top[half], lane));
    float offset[2], sum[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // A row may see no key of the first steps.
        const float base = top[half] == -infinity() ? 0 : top[half];
        offset[half] = -base * scale;
        shrink[half] = exp2_fast((peak[half] - base) * scale);  // exactly 1 where the peak stays
        peak[half] = top[half];
    }
#pragma unroll
    for (int i = 0; i < COUNT / 2; i += 4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float &x = s[i + 2 * half], &y = s[i + 2 * half + 1];
            x = exp2_fast(fmaf(x, scale, offset[half]));
            y = exp2_fast(fmaf(y, scale, offset[half]));
            sum[half] += x + y;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) total[half] = fmaf(total[half], shrink[half], sum[half]);
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

template <int COUNT>
__device__ inline void round_off(unsigned (&p)[COUNT / 16][4], const float (&s)[COUNT / 2])
{
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) p[i / 4][i % 4] = bits(s[2 * i], s[2 * i + 1]);
}

// out: of the item's first query.
__device__ inline void write(
    storage_t *out, const float (&o)[HEAD_DIM / 2], const float (&total)[2], const Rows &rows)
{
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = rows.row + 8 * half;
        float sum = total[half];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        const float inverse = 1 / sum;
        storage_t *to = out + (size_t)row * NUM_HEADS * HEAD_DIM + 8 * t;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 4) {
            unsigned x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 4 * (n + i) + 2 * half;
                x[i] = bits(o[at] * inverse, o[at + 1] * inverse);
            }
            transpose(x);
            if (row < rows.count)
                *reinterpret_cast<uint4 *>(to + 8 * n) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}
