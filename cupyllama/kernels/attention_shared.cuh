// The shared memory of attention_sm90.cu: what lies where, and how it is written and read.

// Places in it, as addresses.
struct Room {
    unsigned base;
    __device__ unsigned buffer(int i) const { return base + QUERY_BYTES + i * PART; }
    __device__ unsigned positions() const { return base + POSITIONS; }
    __device__ unsigned full(int i) const { return base + BARRIERS + 8 * i; }
    __device__ unsigned empty(int i) const { return full(BUFFERS + i); }
    __device__ unsigned queries_full() const { return full(2 * BUFFERS); }
    __device__ unsigned queries_empty() const { return full(2 * BUFFERS + 1); }
    __device__ unsigned piece() const { return base + RECORDS; }
    __device__ unsigned tickets() const { return base + RECORDS + 16; }
    __device__ unsigned step(int i) const { return base + RECORDS + 32 + 16 * i; }
};

// A buffer of the ring and the parity of its barriers in the round that comes.
struct Turn {
    int at;
    unsigned parity;
    __device__ void next()
    {
        if (++at == BUFFERS) at = 0, parity ^= 1;
    }
};

// Numbers of the block's barriers; __syncthreads() has 0.
constexpr int PRODUCERS_MEET = 1;
constexpr int GROUP_TURN = 2;  // of the first warpgroup; the second has the next

__device__ inline void store_words(unsigned to, int a, int b, int c, int d)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ inline int4 load_words(unsigned from)
{
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

__device__ inline void store_word(unsigned to, int a)
{
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(to), "r"(a) : "memory");
}

__device__ inline int load_word(unsigned from)
{
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

// Four matrices of 8 x 8, as a of wgmma; a lane names a row.
__device__ inline void load_matrix(unsigned (&x)[4], unsigned from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

__device__ inline void copy_word_async(unsigned to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from) : "memory");
}

// Waits until `threads` threads of the block, with this one, have come to barrier `number`.
__device__ inline void meet(int number, int threads)
{
    asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

// Comes to it and goes on.
__device__ inline void announce(int number, int threads)
{
    asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(threads) : "memory");
}
