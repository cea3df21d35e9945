// swiglu: out = gate / (1 + exp(-gate)) * up
//
// gate and up lie side by side as one matrix product left them.  Grid (tokens, packs / blockDim.x).
#include "common.cuh"

constexpr int WIDTH = pack_width(INTERMEDIATE);

extern "C" __global__ void swiglu(
    storage_t *__restrict__ out,            // (tokens, INTERMEDIATE)
    const storage_t *__restrict__ gate_up)  // (tokens, 2 * INTERMEDIATE)
{
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= INTERMEDIATE) return;
    const storage_t *row = gate_up + (size_t)blockIdx.x * 2 * INTERMEDIATE;
    float gate[WIDTH], up[WIDTH];
    load(gate, row + i);
    load(up, row + INTERMEDIATE + i);
    // exp(-gate) may overflow to infinity; the quotient is then -0, as it should be.
#pragma unroll
    for (int j = 0; j < WIDTH; j++) up[j] *= gate[j] / (1 + expf(-gate[j]));
    store(out + (size_t)blockIdx.x * INTERMEDIATE + i, up);
}
