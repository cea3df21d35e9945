// sum_parts: own = received[0] + ... + received[RANKS - 1], with own itself as the part of `rank`
//
// In that order, in float, and rounded once: what all ranks have of a sum is the same bits, wherever
// in the batch it stands.  A thread has WIDTH numbers, of all parts.
#include "common.cuh"

extern "C" __global__ void sum_parts(
    storage_t *own,                           // (WIDTH * packs,)
    const storage_t *__restrict__ received,   // (RANKS, WIDTH * packs)
    long long packs,
    int rank)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float sum[WIDTH] = {};
#pragma unroll
    for (int part = 0; part < RANKS; part++) {
        float x[WIDTH];
        load(x, part == rank ? own + WIDTH * i : received + WIDTH * (part * (size_t)packs + i));
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum[j] += x[j];
    }
    store(own + WIDTH * i, sum);
}
