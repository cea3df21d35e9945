// swiglu: out = gate / (1 + exp(-gate)) * up
//
// gate and up lie side by side as one matrix product left them.  Without QUANTIZE a grid of (tokens,
// packs / blockDim.x); with it one block of THREADS a row, which stays in registers until its largest
// number is known, by which e4m3 is scaled.
#define WIDTH pack_width(INTERMEDIATE)
#define PACKS (INTERMEDIATE / WIDTH)
#if QUANTIZE
#include "row.cuh"
#else
#include "common.cuh"
#endif

// exp(-gate) may overflow to infinity; the quotient is then -0, as it should be.
__device__ inline void gated(float (&out)[WIDTH], const storage_t *row, int pack)
{
    float gate[WIDTH];
    load(gate, row + pack * WIDTH);
    load(out, row + INTERMEDIATE + pack * WIDTH);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out[i] *= gate[i] / (1 + expf(-gate[i]));
}

#if QUANTIZE
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(
    unsigned char *__restrict__ out,        // (tokens, INTERMEDIATE) e4m3
    float *__restrict__ scale,              // (tokens,)
    const storage_t *__restrict__ gate_up)  // (tokens, 2 * INTERMEDIATE)
{
    const storage_t *from = gate_up + (size_t)blockIdx.x * 2 * INTERMEDIATE;
    float row[SLOTS][WIDTH];
    for_each_pack([&](int slot, int pack) { gated(row[slot], from, pack); });
    store_row(out + (size_t)blockIdx.x * INTERMEDIATE, scale + blockIdx.x, row);
}
#else
extern "C" __global__ void swiglu(
    storage_t *__restrict__ out,            // (tokens, INTERMEDIATE)
    const storage_t *__restrict__ gate_up)  // (tokens, 2 * INTERMEDIATE)
{
    const int pack = blockIdx.y * blockDim.x + threadIdx.x;
    if (pack >= PACKS) return;
    float product[WIDTH];
    gated(product, gate_up + (size_t)blockIdx.x * 2 * INTERMEDIATE, pack);
    store(out + (size_t)blockIdx.x * INTERMEDIATE + pack * WIDTH, product);
}
#endif
