// sample: the next token of a row from its logits; ops/sampling_reference.py says what it is.
// top_log_probs: the most likely tokens of a row and their log softmax.
// put: a row of the state that sample keeps, begun.
//
// One block a row.  Logits are looked at where they are, in the L2 cache: once for the largest, and
// where a token is drawn, twice for each end that top-k or top-p sets and twice for the draw.  The
// penalty is written into them first.  Probabilities are never written.
#include "select.cuh"

constexpr int SEEN_WORDS = (VOCAB + 31) / 32;
constexpr float LOG2_E = 1.44269504f;

// Random bits: Philox4x32-10 (Salmon et al. 2011), the first two words.
__device__ inline Wide philox(Wide seed, unsigned number)
{
    unsigned a = number, b = 0, c = 0, d = 0, k = seed, m = seed >> 32;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const Wide first = 0xd2511f53ull * a, second = 0xcd9e8d57ull * c;
        a = (unsigned)(second >> 32) ^ b ^ k;
        b = second;
        c = (unsigned)(first >> 32) ^ d ^ m;
        d = first;
        k += 0x9e3779b9;
        m += 0xbb67ae85;
    }
    return (Wide)b << 32 | a;
}

// A thread has the 32 tokens of a word of `seen`.
__device__ inline void penalise(float *logits, const unsigned *seen, float penalty)
{
    for (int word = threadIdx.x; word < SEEN_WORDS; word += THREADS) {
        for (unsigned bits = seen[word]; bits; bits &= bits - 1) {
            float *logit = logits + word * 32 + __ffs(bits) - 1;
            *logit = *logit < 0 ? *logit * penalty : *logit / penalty;
        }
    }
    __syncthreads();
}

__device__ inline Wide share_of(float top_p, Wide total)
{
    const Wide share = ceil((double)top_p * (double)total);
    return share ? share : 1;
}

// Each thread's logit, and its weight: that with which `need` is reached is the threshold.
__device__ inline void end_in_list(Space &space, float x, Wide own, Wide before, Wide need)
{
    if (before < need && need <= before + own) space.threshold = x;
    __syncthreads();
}

// Leave out what top-k does.  Where the list holds all that it keeps, top-p is done too, and top_p
// is 1 from here on.
__device__ inline void cut_top_k(Space &space, Row &row, int top_k, float &top_p)
{
    Group group = {0, ALL_BITS};
    fill_bins<false>(space, row);
    if (!find_digit<false>(space, group, top_k, true, group.bin)) return;
    while (group.inside > LIST && group.unknown > TOKEN_BITS) {
        split<false>(space, row, group, top_k);
    }
    if (group.inside > LIST) {  // all of them are equal
        row.least = logit_of(group.prefix);
        return;
    }
    const bool all = group.before + group.inside <= LIST;
    const int listed = list_keys(space, row, group, all);
    const int last = top_k - 1 - (all ? 0 : (int)group.before);
    row.least = logit_of(space.list[last]);
    if (!all || top_p == 1) return;

    const float x = logit_of(space.list[threadIdx.x]);
    const Wide own = threadIdx.x < listed ? weight(row, x) : 0;
    Wide total;
    const Wide before = sum_before(own, space.partial, total);
    end_in_list(space, x, own, before, share_of(top_p, total));
    top_p = 1;
    row.least = space.threshold;
}

// Leave out what top-p does, of what is left.
__device__ inline void cut_top_p(Space &space, Row &row, float top_p)
{
    Group group = {0, ALL_BITS};
    fill_bins<true>(space, row);
    Wide total;
    Wide own = 0;
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        own += (Wide)space.histogram[bin] << (OCTAVES - 1 - bin / BINS_PER_OCTAVE);
    }
    sum_before(own, space.partial, total);
    const Wide need = share_of(top_p, total);
    find_digit<true>(space, group, need, true, group.bin);
    while (group.inside > LIST && group.unknown > TOKEN_BITS) {
        split<true>(space, row, group, need);
    }
    if (group.inside > LIST) {  // all of them are equal
        row.least = logit_of(group.prefix);
        return;
    }
    const int listed = list_keys(space, row, group, false);
    const float x = logit_of(space.list[threadIdx.x]);
    own = threadIdx.x < listed ? weight(row, x) : 0;
    const Wide before = group.before + sum_before(own, space.partial, total);
    end_in_list(space, x, own, before, need);
    row.least = space.threshold;
}

// A token of what is left, as likely as its weight has it; only one thread learns which.
template <typename Use>
__device__ inline void draw(Space &space, const Row &row, Wide random, Use use)
{
    Wide own = 0;
    for_each_token(row.logits, [&](float x, int) { own += weight(row, x); });
#pragma unroll
    for (int lane = 16; lane; lane /= 2) own += __shfl_xor_sync(ALL_LANES, own, lane);
    const bool leads = threadIdx.x % 32 == 0;
    Wide total;
    const Wide before = sum_before(leads ? own : 0, space.partial, total);
    const Wide wanted = __umul64hi(random, total);
    if (leads && before <= wanted && wanted < before + own) {
        space.found.bin = threadIdx.x / 32 * CHUNK;
        space.found.before = before;
    }
    __syncthreads();

    // The tokens of one warp, and now all threads look for it there.
    constexpr int PART = (CHUNK + THREADS - 1) / THREADS;
    const int chunk = space.found.bin, first = chunk + threadIdx.x * PART;
    const int end = min(min(VOCAB, chunk + CHUNK), first + PART);
    own = 0;
    for (int id = first; id < end; id++) own += weight(row, row.logits[id]);
    Wide reached = space.found.before + sum_before(own, space.partial, total);
    if (wanted < reached || reached + own <= wanted) return;
    for (int id = first; id < end; id++) {
        reached += weight(row, row.logits[id]);
        if (wanted < reached) return use(id);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    int *__restrict__ tokens,                // (state rows,)
    unsigned *__restrict__ seen,             // (state rows, SEEN_WORDS)
    int *__restrict__ drawn,                 // (state rows,)
    float *logits,                           // (n, VOCAB)
    const int *__restrict__ rows,            // (n,)
    const float *__restrict__ temperature,   // (state rows,), as the next
    const int *__restrict__ top_k,
    const float *__restrict__ top_p,
    const float *__restrict__ repetition_penalty,
    const Wide *__restrict__ seed)
{
    __shared__ Space space;
    const int number = rows[blockIdx.x];
    if (number < 0) return;
    unsigned *row_seen = seen + (size_t)number * SEEN_WORDS;
    const auto take = [&](int token) {
        tokens[number] = token;
        row_seen[token / 32] |= 1u << token % 32;
        drawn[number]++;
    };

    Row row = {logits + (size_t)blockIdx.x * VOCAB, 0, 0, -infinity()};
    const float penalty = repetition_penalty[number];
    if (penalty != 1) penalise(logits + (size_t)blockIdx.x * VOCAB, row_seen, penalty);
    int best;
    row.peak = find_peak(row.logits, best, space);
    if (best == NO_TOKEN) {
        if (threadIdx.x == 0) tokens[number] = NO_TOKEN;
        return;
    }
    const float warmth = temperature[number];
    if (warmth == 0) {
        if (threadIdx.x == 0) take(best);
        return;
    }

    row.scale = LOG2_E / warmth;
    const int k = top_k[number];
    float p = top_p[number];
    if (k > 0 && k < VOCAB) cut_top_k(space, row, k, p);
    if (p < 1) cut_top_p(space, row, p);
    draw(space, row, philox(seed[number], drawn[number]), take);
}

extern "C" __global__ void __launch_bounds__(THREADS) top_log_probs(
    float *__restrict__ values,        // (rows, count)
    int *__restrict__ ids,             // (rows, count)
    const float *__restrict__ logits,  // (rows, VOCAB)
    int count)                         // at most LIST / 2
{
    __shared__ Space space;
    __shared__ float sums[WARPS];
    Row row = {logits + (size_t)blockIdx.x * VOCAB, 0, LOG2_E, -infinity()};
    int best;
    row.peak = find_peak(row.logits, best, space);

    // As fill_bins, and the sum for softmax.
    float sum = 0;
    clear(space);
    for_each_token(row.logits, [&](float x, int) {
        sum += exp2f(-octaves_below(row, x));
        const int bin = bin_of(row, x);
        if (bin < BINS) atomicAdd(&space.histogram[bin], 1);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const float log_sum = logf(warp_sum(sums[threadIdx.x % 32]));

    Group group = {0, ALL_BITS};
    if (!find_digit<false>(space, group, count, true, group.bin)) {
        group.bin = BINS;
        group.inside = VOCAB - group.before;
    }
    while (group.before + group.inside > LIST) split<false>(space, row, group, count);
    list_keys(space, row, group, true);
    if (threadIdx.x < count) {
        const Wide key = space.list[threadIdx.x];
        const size_t place = (size_t)blockIdx.x * count + threadIdx.x;
        values[place] = logit_of(key) - row.peak - log_sum;
        ids[place] = (unsigned)key;
    }
}

// Fill a row of the state, and say which tokens its sequence has.
extern "C" __global__ void put(
    unsigned *__restrict__ seen,       // (state rows, SEEN_WORDS)
    float *__restrict__ temperature,   // (state rows,), as the next
    int *__restrict__ top_k,
    float *__restrict__ top_p,
    float *__restrict__ repetition_penalty,
    Wide *__restrict__ seed,
    int *__restrict__ drawn,
    const int *__restrict__ seen_ids,  // (count,)
    int count,
    int row,
    float row_temperature,
    int row_top_k,
    float row_top_p,
    float row_penalty,
    Wide row_seed)
{
    seen += (size_t)row * SEEN_WORDS;
    for (int word = threadIdx.x; word < SEEN_WORDS; word += blockDim.x) seen[word] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        atomicOr(seen + seen_ids[i] / 32, 1u << seen_ids[i] % 32);
    }
    if (threadIdx.x) return;
    temperature[row] = row_temperature;
    top_k[row] = row_top_k;
    top_p[row] = row_top_p;
    repetition_penalty[row] = row_penalty;
    seed[row] = row_seed;
    drawn[row] = 0;
}
