// rope, in place on the queries and keys of qkv:
//     a' = a cos - b sin,  b' = b cos + a sin,  a = head[i], b = head[i + HALF]
//
// One block a token, whose cos and sin rows stay in the cache; a thread turns WIDTH pairs at a time.
#include "common.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int WIDTH = pack_width(HALF);
constexpr int PACKS = HALF / WIDTH;  // packs a half head
constexpr int TABLE_WIDTH = WIDTH < 4 ? WIDTH : 4;

__device__ inline void load_table(float (&x)[WIDTH], const float *p)
{
#pragma unroll
    for (int i = 0; i < WIDTH; i += TABLE_WIDTH) {
        float part[TABLE_WIDTH];
        load(part, p + i);
#pragma unroll
        for (int j = 0; j < TABLE_WIDTH; j++) x[i + j] = part[j];
    }
}

extern "C" __global__ void rope(
    storage_t *__restrict__ qkv,        // (tokens, ROW), the first ROTATED_HEADS heads are q and k
    const int *__restrict__ positions,  // (tokens,)
    const float *__restrict__ cos,      // (positions, HALF)
    const float *__restrict__ sin)      // (positions, HALF)
{
    storage_t *heads = qkv + (size_t)blockIdx.x * ROW;
    const size_t table_row = (size_t)positions[blockIdx.x] * HALF;
    for (int item = threadIdx.x; item < ROTATED_HEADS * PACKS; item += blockDim.x) {
        const int i = item % PACKS * WIDTH;
        storage_t *first = heads + item / PACKS * HEAD_DIM + i, *second = first + HALF;
        float a[WIDTH], b[WIDTH], c[WIDTH], s[WIDTH];
        load(a, first);
        load(b, second);
        load_table(c, cos + table_row + i);
        load_table(s, sin + table_row + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const float turned = a[j] * c[j] - b[j] * s[j];
            b[j] = b[j] * c[j] + a[j] * s[j];
            a[j] = turned;
        }
        store(first, a);
        store(second, b);
    }
}
