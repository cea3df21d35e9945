// log_probs: out[0, t] = log softmax(logits[r])[token_t],  out[1, t] = 1 if token_t is the arg max
//
// One pass over the vocabulary: peak, sum of exponentials and arg max together; log-probabilities of
// other tokens are never written.  One block of THREADS a logit row; a row without targets costs
// nothing.  A NaN among the logits makes the sum NaN, and with it every target of the row.
#define STORAGE FP32
#include "common.cuh"

constexpr int WIDTH = pack_width(VOCAB);
constexpr float LOWEST = -3.402823466e38f;  // finite, so that exp(-infinity - peak) is 0, not NaN

struct Best {
    float peak;   // largest logit seen, at least LOWEST
    float sum;    // of exp(logit - peak)
    int token;    // the lowest one whose logit is the peak
};

__device__ inline Best merge(Best a, Best b)
{
    const bool first = a.peak > b.peak || (a.peak == b.peak && a.token < b.token);
    const float peak = fmaxf(a.peak, b.peak);
    const float sum = a.sum * expf(a.peak - peak) + b.sum * expf(b.peak - peak);
    return {peak, sum, first ? a.token : b.token};
}

__device__ inline Best merge_warp(Best best)
{
#pragma unroll
    for (int lane = 16; lane; lane /= 2) {
        const Best other = {__shfl_xor_sync(ALL_LANES, best.peak, lane),
                            __shfl_xor_sync(ALL_LANES, best.sum, lane),
                            __shfl_xor_sync(ALL_LANES, best.token, lane)};
        best = merge(best, other);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(THREADS) log_probs(
    float *__restrict__ out,               // (2, targets)
    const float *__restrict__ logits,      // (rows, VOCAB)
    const int *__restrict__ target_start,  // (rows + 1,)
    const int *__restrict__ target_token,  // (targets,)
    int targets)
{
    const int first_target = target_start[blockIdx.x], end_target = target_start[blockIdx.x + 1];
    if (first_target == end_target) return;
    const float *row = logits + (size_t)blockIdx.x * VOCAB;

    Best best = {LOWEST, 0, VOCAB};
#pragma unroll 4
    for (int i = threadIdx.x * WIDTH; i < VOCAB; i += THREADS * WIDTH) {
        float x[WIDTH];
        load(x, row + i);
        float peak = best.peak;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            if (x[j] > peak) {  // strictly: the lowest token wins a tie
                peak = x[j];
                best.token = i + j;
            }
        }
        float sum = 0;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum += expf(x[j] - peak);
        best.sum = best.sum * expf(best.peak - peak) + sum;
        best.peak = peak;
    }

    __shared__ Best partial[THREADS / 32];
    best = merge_warp(best);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    best = partial[0];
    for (int warp = 1; warp < THREADS / 32; warp++) best = merge(best, partial[warp]);

    const float log_sum = logf(best.sum);
    for (int target = first_target + threadIdx.x; target < end_target; target += THREADS) {
        const int token = target_token[target];
        out[target] = row[token] - best.peak - log_sum;
        out[targets + target] = token == best.token;
    }
}
