// What the kernels of compute capability 9.0 share: barriers in shared memory, copies that arrive
// at them, and products by wgmma, for which a warpgroup of 128 threads works together.
//
// Addresses of shared memory are 32-bit numbers.  A wait at a barrier names the parity of the phase
// that it waits for; for the phase before the first it returns at once.
//
// Registers of wgmma (PTX ISA, 9.7.15): each of the four warps has 16 rows; with g = lane / 4 and
// t = lane % 4, element i of c is row g + i / 2 % 2 * 8, column i / 4 * 8 + 2 * t + i % 2, and a is
// held as by mma.m16n8k16.
#include "common.cuh"

__device__ inline void init_barrier(unsigned barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

__device__ inline void arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrives when all that this thread has asked cp.async for is there.
__device__ inline void arrive_when_copied(unsigned barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

__device__ inline void wait(unsigned barrier, unsigned parity)
{
    int done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                     " selp.b32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// 16 bytes from global to shared memory, or that many zeros.
__device__ inline void copy_async(unsigned to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

// Where unit `unit` of row `row` lies in a matrix of `rows` rows: 128 bytes of each row together,
// their units permuted by the row, so that neither rows nor columns meet in a bank.
__device__ inline unsigned swizzled(int row, int unit, int rows)
{
    return unit / 8 * rows * 128 + row * 128 + ((unit % 8 ^ row % 8) << 4);
}

// Registers a thread from here on, in multiples of 8; every warp of a warpgroup asks for the same.
template <int COUNT>
__device__ inline void give_registers_back()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

template <int COUNT>
__device__ inline void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

__device__ inline unsigned bits(float a, float b)  // two numbers as wgmma takes them
{
    Pack<storage_t, 2> pair;
    from_float(pair.x[0], a);
    from_float(pair.x[1], b);
    return reinterpret_cast<const unsigned &>(pair);
}

// A matrix in shared memory as wgmma takes it: swizzled over 128 bytes, groups of 8 rows 1024 bytes
// apart, counted in units of 16.  `low` is its address, and in the upper half the way from one
// column of 128 bytes to the next where these are rows of B.
__device__ inline unsigned long long matrix(unsigned low)
{
    return (unsigned long long)(1u << 30 | 1024 / 16) << 32 | low;
}

#if STORAGE == FP16
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#endif
#define FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 4), FOUR(c, i + 8), FOUR(c, i + 12)

// c += a b, or c = a b: 64 x 16 by 16 x 64; in memory a row is a column of b, of b itself where
// TRANSPOSED is 1.
template <int TRANSPOSED>
__device__ inline void multiply(
    float (&c)[32], const unsigned (&a)[4], unsigned long long b, int accumulate)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; " WGMMA(64)
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
                 "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
                 : SIXTEEN(c, 0), SIXTEEN(c, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),
                   "n"(TRANSPOSED));
}

// The same for 128 columns.
template <int TRANSPOSED>
__device__ inline void multiply(
    float (&c)[64], const unsigned (&a)[4], unsigned long long b, int accumulate)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; " WGMMA(128)
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
                 "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, "
                 "%33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "
                 "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
                 : SIXTEEN(c, 0), SIXTEEN(c, 16), SIXTEEN(c, 32), SIXTEEN(c, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),
                   "n"(TRANSPOSED));
}

__device__ inline void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps what is computed before from moving behind what comes after, and the other way round.
template <int N>
__device__ inline void pin(float (&c)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i]) :: "memory");
}

// Waits until at most PENDING groups are under way; `c` is what a finished one computed.
template <int PENDING, int N>
__device__ inline void finish(float (&c)[N])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
    pin(c);
}

// What was written by cp.async becomes visible to wgmma, which reads shared memory its own way.
__device__ inline void wait_for_matrix(unsigned barrier, unsigned parity)
{
    wait(barrier, parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// This warp has read what the barrier guards.
__device__ inline void release(unsigned barrier)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}
