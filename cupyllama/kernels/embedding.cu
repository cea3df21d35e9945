// embedding: out[t] = weight[token_ids[t]]
//
// A copy: numbers are not looked at, so rows are UNITS units of UNIT_BYTES, 16 where the row allows.
// One block a token.

struct alignas(UNIT_BYTES) Unit {
    unsigned char bytes[UNIT_BYTES];
};

extern "C" __global__ void embedding(
    Unit *__restrict__ out,           // (tokens, UNITS)
    const int *__restrict__ token_ids,  // (tokens,)
    const Unit *__restrict__ weight)  // (vocab, UNITS)
{
    const Unit *from = weight + (size_t)token_ids[blockIdx.x] * UNITS;
    Unit *to = out + (size_t)blockIdx.x * UNITS;
    for (int i = threadIdx.x; i < UNITS; i += blockDim.x) to[i] = from[i];
}
