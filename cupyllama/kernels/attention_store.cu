// attention_store: cache[slots[i]] = the keys and values that row i of qkv ends with
//
// A copy, as gather.cu makes it: by UNITS units of UNIT_BYTES.  One block a token.

struct alignas(UNIT_BYTES) Unit {
    unsigned char bytes[UNIT_BYTES];
};

extern "C" __global__ void attention_store(
    Unit *__restrict__ cache,       // (slots, UNITS)
    const Unit *__restrict__ qkv,   // (tokens, ROW_UNITS)
    const int *__restrict__ slots)  // (tokens,)
{
    const Unit *from = qkv + (size_t)blockIdx.x * ROW_UNITS + ROW_UNITS - UNITS;
    Unit *to = cache + (size_t)slots[blockIdx.x] * UNITS;
    for (int i = threadIdx.x; i < UNITS; i += blockDim.x) to[i] = from[i];
}
