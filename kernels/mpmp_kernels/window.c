/* Windows: sums over memory that processes share, and the words with which they wait for one another.
 *
 * This file knows nothing of MPI: a `lane` is a table of where everybody's memory is mapped here, a
 * `call` is a list of steps over it (mpmp/programs/windows.py has their meaning). mpmp_run carries out
 * as many steps as it can and returns where it would wait for long: the waiting itself, its limit and
 * its signals belong to the caller. reference.py and mpmp/comm/lane.py do the same without a compiler.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT64, FLOAT16, INT64, INT32, NUM_KERNELS, OTHER = NUM_KERNELS };
enum { LOAD, PUBLISH, AWAIT, COMBINE, COPY };
enum { DONE, WAITING, COMBINE_ELSEWHERE, NOT_ALIKE, NOT_ALL_IN_WINDOWS };
enum { ALL = -2, RESULT = -3, RESULT_AND_SLOT = -4 };

/* --- copies ---------------------------------------------------------------------------------- */

/* What another core reads next is better in memory than dirty in this core's cache: on the machines
 * measured (docs/log.md) fetching a dirty line from another core takes three times as long. */
static void copy_past_cache(char *to, const char *from, size_t n) {
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)to & 63); /* whole lines from there on, each in one go */
    if (n < 128) head = n;
    memcpy(to, from, head);
    size_t i = head;
    for (; i + 64 <= n; i += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
        __m256i low = _mm256_loadu_si256((const void *)(from + i));
        __m256i high = _mm256_loadu_si256((const void *)(from + i + 32));
        _mm256_stream_si256((void *)(to + i), low);
        _mm256_stream_si256((void *)(to + i + 32), high);
#else
        __m128i quarter[4];
        memcpy(quarter, from + i, 64);
        for (int q = 0; q < 4; q++) _mm_stream_si128((void *)(to + i + 16 * q), quarter[q]);
#endif
    }
    memcpy(to + i, from + i, n - i);
#else
    memcpy(to, from, n);
#endif
}

/* Streamed stores are ordered with what is published later by this fence alone. */
static inline void finish_copies(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Copy what nobody reads soon. */
void mpmp_copy(int64_t n, const char *from, char *to) {
    copy_past_cache(to, from, n);
    finish_copies();
}

enum {
    SLOT_PAST_CACHE = 2048,       /* bytes from which a slot is filled past the cache */
    PUBLISH_PAST_CACHE = 1 << 22 /* bytes from which a sum is published past the cache */
};

/* --- the sum-and-publish kernels -------------------------------------------------------------- */

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to nearest, ties to even; every NaN becomes the one that torch writes. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return (uint16_t)((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#define AS_IT_IS(x) (x)
#define BLOCK 256 /* elements whose partial sums stay in the first-level cache, all streams in step */

/* Sums in the order of the sources, in ACC, rounded once. Sources may be the targets themselves, at
 * the same place: each element is read everywhere before it is written anywhere, which is what
 * `ivdep` promises to the compiler. Two sources, the commonest case, need no block. All targets but
 * `near` are stored past the cache, none where it is -1. */
#define SUM_KERNEL(NAME, T, ACC, QUOTIENT, FROM, TO)                                                 \
    static void NAME(int64_t n, int64_t num_sources, const T **sources, int64_t num_targets,         \
                     T **targets, double divide, int64_t near) {                                     \
        ACC by = (ACC)divide;                                                                        \
        if (num_sources == 2 && num_targets == 2 && by == 1 && near < 0) {                              \
            const T *a = sources[0], *b = sources[1];                                                \
            T *c = targets[0], *d = targets[1];                                                      \
            _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                   \
                T sum = TO((ACC)(FROM(a[i]) + FROM(b[i])));                                          \
                c[i] = sum;                                                                          \
                d[i] = sum;                                                                          \
            }                                                                                        \
            return;                                                                                  \
        }                                                                                            \
ACC sums[BLOCK];                                                                             \
        T rounded[BLOCK];                                                                            \
        for (int64_t start = 0; start < n; start += BLOCK) {                                         \
            int64_t m = n - start < BLOCK ? n - start : BLOCK;                                       \
            const T *a = sources[0] + start, *b = sources[num_sources > 1] + start;                  \
            if (num_sources == 1)                                                                    \
                for (int64_t i = 0; i < m; i++) sums[i] = FROM(a[i]);                                \
            else                                                                                     \
                for (int64_t i = 0; i < m; i++) sums[i] = FROM(a[i]) + FROM(b[i]);                   \
            for (int64_t s = 2; s < num_sources; s++) {                                              \
                const T *source = sources[s] + start;                                                \
                for (int64_t i = 0; i < m; i++) sums[i] += FROM(source[i]);                          \
            }                                                                                        \
            if (by != 1)                                                                             \
                for (int64_t i = 0; i < m; i++) sums[i] = (ACC)((QUOTIENT)sums[i] / (QUOTIENT)by);   \
            const char *sum = (const char *)sums;                                                    \
            if (sizeof(T) != sizeof(ACC)) {                                                          \
                for (int64_t i = 0; i < m; i++) rounded[i] = TO(sums[i]);                            \
                sum = (const char *)rounded;                                                         \
            }                                                                                        \
            for (int64_t t = 0; t < num_targets; t++) {                                              \
                if (near >= 0 && t != near)                                                          \
                    copy_past_cache((char *)(targets[t] + start), sum, (size_t)m * sizeof(T));       \
                else                                                                                 \
                    memcpy(targets[t] + start, sum, (size_t)m * sizeof(T));                          \
            }                                                                                        \
        }                                                                                            \
    }

SUM_KERNEL(sum_float32, float, float, float, AS_IT_IS, AS_IT_IS)
SUM_KERNEL(sum_float64, double, double, double, AS_IT_IS, AS_IT_IS)
SUM_KERNEL(sum_bfloat16, uint16_t, float, float, from_bfloat16, to_bfloat16)
/* Unsigned, because sums of signed integers may not overflow in C; the bits are the same. Quotients
 * are signed. */
SUM_KERNEL(sum_int64, uint64_t, uint64_t, int64_t, AS_IT_IS, AS_IT_IS)
SUM_KERNEL(sum_int32, uint32_t, uint32_t, int32_t, AS_IT_IS, AS_IT_IS)
#ifdef __FLT16_MAX__
SUM_KERNEL(sum_float16, _Float16, float, float, (float), (_Float16))
#endif

/* The elementwise sum of `sources`, in their order, divided by `divide`, stored to all `targets`;
 * `near` is the target that this core reads next, -1 where it may be any of them: targets of
 * `past_cache` bytes and more are stored past the cache, but for the near one. Returns 0, or 1 where
 * this machine has no kernel for the dtype. */
static int sum(int64_t dtype, int64_t n, int64_t num_sources, void **sources, int64_t num_targets,
               void **targets, double divide, int64_t near, int64_t past_cache) {
#define CASE(DTYPE, NAME, T)                                                                         \
    case DTYPE:                                                                                      \
        if (n * (int64_t)sizeof(T) < past_cache) near = -1;                                          \
        NAME(n, num_sources, (const T **)sources, num_targets, (T **)targets, divide, near);         \
        break
    switch (dtype) {
        CASE(FLOAT32, sum_float32, float);
        CASE(FLOAT64, sum_float64, double);
        CASE(BFLOAT16, sum_bfloat16, uint16_t);
        CASE(INT64, sum_int64, uint64_t);
        CASE(INT32, sum_int32, uint32_t);
#ifdef __FLT16_MAX__
        CASE(FLOAT16, sum_float16, _Float16);
#endif
        default: return 1;
    }
    if (near >= 0) finish_copies();
    return 0;
}

/* The same where the targets are windows, which fit into the caches unless they are very long. */
int mpmp_sum_publish(int64_t dtype, int64_t n, int64_t num_sources, void **sources, int64_t num_targets,
                     void **targets, double divide, int64_t near) {
    return sum(dtype, n, num_sources, sources, num_targets, targets, divide, near, PUBLISH_PAST_CACHE);
}

/* --- steps over shared memory ----------------------------------------------------------------- */

/* What a rank shows the others, each line on its own cache line. Two headers in turns: a slow rank
 * may still read the last one while its owner announces the next operation. */
struct line {
    _Alignas(64) _Atomic uint64_t published;
    struct {
        _Alignas(64) int64_t offset; /* of its buffer in its share, or -1: not in its share */
        uint64_t signature;          /* of what it is about to do */
    } header[2];
};

struct lane {
    int64_t size, rank;
    char **shares;       /* where each rank's share is mapped here */
    struct line **lines; /* each rank's line */
    uint64_t base;       /* how often everybody has published before the operation under way */
    uint64_t turn;       /* number of the operation under way */
};

/* `count` elements from `place` on of every buffer, from `start` on of input and result. */
struct step {
    int64_t kind, source, target, start, place, count;
};

struct call {
    struct lane *lane;
    struct step *steps;
    int64_t num_steps, dtype, itemsize;
    double divide;
    uint64_t signature;
    int64_t offset;   /* of this rank's buffer, or first slot, in its own share, or -1 */
    int64_t slot_bytes; /* of each of two slots, through which pieces pass in turns; 0: no slots */
    char *input;      /* what LOAD copies into this rank's slots */
    char *result;     /* this rank's private memory that RESULT means; may be the input */
    char **buffers;   /* room for the address of everybody's buffer; filled when all have arrived */
    void **pointers;  /* room for 2 x size + 1 pointers */
    int64_t at, published, awaited, met; /* how far it has come; zero between two runs */
    int64_t stranger;                    /* whose signature is another */
};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int await(struct lane *lane, int64_t source, uint64_t published, int64_t spins, int64_t yields) {
    struct line *line = lane->lines[source];
    while (atomic_load_explicit(&line->published, memory_order_acquire) < published) {
        if (spins > 0) {
            spins--;
            pause_briefly();
        } else if (yields > 0) {
            yields--;
            sched_yield();
        } else {
            return 0;
        }
    }
    return 1;
}

/* All have arrived: are they about to do the same, and where are their buffers? */
static int meet(struct call *call) {
    struct lane *lane = call->lane;
    int missing = 0;
    for (int64_t rank = 0; rank < lane->size; rank++) {
        int64_t offset = lane->lines[rank]->header[lane->turn & 1].offset;
        if (lane->lines[rank]->header[lane->turn & 1].signature != call->signature) {
            call->stranger = rank;
            return NOT_ALIKE;
        }
        missing |= offset < 0;
        call->buffers[rank] = lane->shares[rank] + offset;
    }
    return missing ? NOT_ALL_IN_WINDOWS : DONE;
}

static void end(struct call *call) {
    call->lane->base += (uint64_t)call->published;
    call->lane->turn++;
    call->at = call->published = call->awaited = call->met = 0;
}

/* Where in a buffer a step's elements lie after as many publications: in the slot whose turn it then
 * is, or, without slots, in the one place that there is. */
static int64_t place(const struct call *call, const struct step *step, int64_t published) {
    int64_t turn = (int64_t)((call->lane->base + (uint64_t)published) & 1);
    return turn * call->slot_bytes + step->place * call->itemsize;
}

static int combine(struct call *call, const struct step *step) {
    struct lane *lane = call->lane;
    void **sources = call->pointers, **targets = call->pointers + lane->size;
    int64_t own = step->start * call->itemsize, there = place(call, step, call->published - 1);
    int64_t num_sources = 0, num_targets = 0;
    for (int64_t rank = 0; rank < lane->size; rank++) {
        char *at = call->buffers[rank] + there;
        /* What this rank has loaded it reads where it was: its slot was filled past the cache. */
        if (call->slot_bytes && rank == lane->rank) at = call->input + own;
        if (step->source == ALL || step->source == rank) sources[num_sources++] = at;
        if (step->target == ALL || step->target == rank) targets[num_targets++] = at;
    }
    if (step->target == RESULT || step->target == RESULT_AND_SLOT) targets[num_targets++] = call->result + own;
    if (step->target == RESULT_AND_SLOT)
        targets[num_targets++] = call->buffers[lane->rank] + place(call, step, call->published);
    if (step->kind == COPY) {
        for (int64_t t = 0; t < num_targets; t++)
            if (targets[t] != sources[0]) memcpy(targets[t], sources[0], (size_t)(step->count * call->itemsize));
        return 0;
    }
    int64_t near = step->target == ALL ? lane->rank : step->target == RESULT_AND_SLOT ? 0 : -1;
    int64_t past_cache = call->slot_bytes ? SLOT_PAST_CACHE : PUBLISH_PAST_CACHE;
    return sum(call->dtype, step->count, num_sources, sources, num_targets, targets, call->divide, near, past_cache);
}

/* This rank's input into the slot whose turn it is. */
static void load(const struct call *call, const struct step *step) {
    char *slot = call->lane->shares[call->lane->rank] + call->offset + place(call, step, call->published);
    const char *input = call->input + step->start * call->itemsize;
    size_t nbytes = (size_t)(step->count * call->itemsize);
    if (nbytes < SLOT_PAST_CACHE) {
        memcpy(slot, input, nbytes);
    } else {
        copy_past_cache(slot, input, nbytes);
        finish_copies();
    }
}

/* Carry out steps until the end (DONE), or until somebody is late for more than `spins` spins and
 * `yields` yields (WAITING: call again), or a sum has no kernel here (COMBINE_ELSEWHERE: do step `at`
 * and call again with `at` one further). NOT_ALIKE and NOT_ALL_IN_WINDOWS end the operation on all
 * ranks alike before anything was written. */
int mpmp_run(struct call *call, int64_t spins, int64_t yields) {
    struct lane *lane = call->lane;
    struct line *own = lane->lines[lane->rank];
    for (; call->at < call->num_steps; call->at++, call->awaited = 0) {
        const struct step *step = &call->steps[call->at];
        switch (step->kind) {
        case LOAD:
            load(call, step);
            break;
        case PUBLISH:
            if (call->published++ == 0) {
                own->header[lane->turn & 1].offset = call->offset;
                own->header[lane->turn & 1].signature = call->signature;
            }
            atomic_store_explicit(&own->published, lane->base + (uint64_t)call->published, memory_order_release);
            break;
        case AWAIT:
            for (; call->awaited < lane->size; call->awaited++) {
                if (step->source != ALL && step->source != call->awaited) continue;
                if (!await(lane, call->awaited, lane->base + (uint64_t)call->published, spins, yields))
                    return WAITING;
            }
            if (!call->met++) {
                int outcome = meet(call);
                if (outcome != DONE) {
                    end(call);
                    return outcome;
                }
            }
            break;
        default:
            if (step->count > 0 && combine(call, step)) return COMBINE_ELSEWHERE;
        }
    }
    end(call);
    return DONE;
}
