// What products of few rows by mma share: operands by cp.async, and what pairs.cuh says.
#include "common.cuh"
#include "pairs.cuh"

// mma.m16n8k16 (PTX ISA, 9.7.14): with g = lane / 4 and t = lane % 4, of A[16][16] a lane holds rows
// g and g + 8, of B[16][8] column g, of C[16][8] rows g and g + 8, columns 2t and 2t + 1.
__device__ inline void mma(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1)
{
#if STORAGE == FP16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or zeros.
__device__ inline void copy_async(uint4 *to, const void *from, bool real)
{
    const unsigned address = __cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
