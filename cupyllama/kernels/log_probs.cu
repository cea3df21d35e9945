// log_probs: out[0, t] = log softmax(logits[r])[token_t],  out[1, t] = 1 if token_t is the arg max
//
// One pass over the vocabulary: peak, sum of exponentials and arg max together; log-probabilities of
// other tokens are never written.  One block of THREADS a logit row; a row without targets costs
// nothing.  A NaN among the logits makes the sum NaN, and with it every target of the row.
//
// Where ranks have VOCAB tokens each, log_probs_part writes what theirs say of every target, and
// join_log_probs, a thread a row, makes of all parts what log_probs would of all the vocabulary.
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

__device__ inline Best best_of(const float *row)  // the same in every thread of the block
{
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
    const Best best = best_of(row);
    const float log_sum = logf(best.sum);
    for (int target = first_target + threadIdx.x; target < end_target; target += THREADS) {
        const int token = target_token[target];
        out[target] = row[token] - best.peak - log_sum;
        out[targets + target] = token == best.token;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) log_probs_part(
    float *__restrict__ out,               // (4, targets): peak, sum, token and the target's logit
    const float *__restrict__ logits,      // (rows, VOCAB)
    const int *__restrict__ target_start,  // (rows + 1,)
    const int *__restrict__ target_token,  // (targets,)
    int targets,
    int first_token)
{
    const int first_target = target_start[blockIdx.x], end_target = target_start[blockIdx.x + 1];
    if (first_target == end_target) return;
    const float *row = logits + (size_t)blockIdx.x * VOCAB;
    const Best best = best_of(row);
    for (int target = first_target + threadIdx.x; target < end_target; target += THREADS) {
        const int column = target_token[target] - first_token;
        out[target] = best.peak;
        out[targets + target] = best.sum;
        out[2 * (size_t)targets + target] = first_token + best.token;  // exact below 2^24
        out[3 * (size_t)targets + target] = column >= 0 && column < VOCAB ? row[column] : 0;
    }
}

extern "C" __global__ void join_log_probs(
    float *__restrict__ out,               // (2, targets)
    const float *__restrict__ parts,       // (ranks, 4, targets), as log_probs_part wrote them
    const int *__restrict__ target_start,  // (rows + 1,)
    const int *__restrict__ target_token,  // (targets,)
    int ranks,
    int rows,
    int targets)
{
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int end_target = target_start[row + 1];
    for (int target = target_start[row]; target < end_target; target++) {
        Best best = {LOWEST, 0, 1 << 30};
        float logit = 0;
        for (int rank = 0; rank < ranks; rank++) {
            const float *part = parts + (size_t)rank * 4 * targets + target;
            const size_t next = targets;
            best = merge(best, {part[0], part[next], (int)part[2 * next]});
            logit += part[3 * next];
        }
        out[target] = logit - best.peak - logf(best.sum);
        out[targets + target] = target_token[target] == best.token;
    }
}
