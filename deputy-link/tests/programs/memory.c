/* Changes its memory at random, in every way that a program can, and checks it against
 * a model: memory SEED STEPS FILE [MEGABYTES]. Prints one line for every 500 steps, which
 * depends on the seed alone. FILE has 64 pages, each filled with its number + 1. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 40, PAGE = 4096, WORDS = PAGE / 8, MOST = 1200, FILE_PAGES = 64 };
enum { ANON, PRIVATE, FIXED };

struct slot {
    char *addr;
    int pages, prot, kind, offset;
    uint64_t value[MOST]; /* of every word of the page */
};

static struct slot slots[SLOTS];
static uint64_t state, digest;
static int file;
static int step;

static uint64_t draw(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static int below(int n) { return n > 0 ? draw() % n : 0; }

static void fail(const char *what, struct slot *s, int page, uint64_t got) {
    printf("step %d: %s: slot %d kind %d page %d of %d at %p: %llx, not %llx\n", step, what,
           (int)(s - slots), s->kind, page, s->pages, s->addr + (long)page * PAGE,
           (unsigned long long)got, (unsigned long long)s->value[page]);
    fflush(stdout);
    exit(1);
}

static void must(long result, const char *what) {
    if (result == -1) {
        printf("step %d: ", step);
        fflush(stdout);
        perror(what);
        exit(2);
    }
}

static void check(struct slot *s, int page) {
    if (!(s->prot & PROT_READ)) return;
    uint64_t *words = (uint64_t *)(s->addr + (long)page * PAGE);
    for (int i = 0; i < WORDS; i += 1 + below(200))
        if (words[i] != s->value[page]) fail("content", s, page, words[i]);
    digest = digest * 31 + words[WORDS - 1];
}

static void fill(struct slot *s, int page, uint64_t value) {
    uint64_t *words = (uint64_t *)(s->addr + (long)page * PAGE);
    for (int i = 0; i < WORDS; i++) words[i] = value;
    s->value[page] = value;
}

static uint64_t fresh(struct slot *s, int page) {
    return s->kind == PRIVATE ? s->offset + page + 1 : 0;
}

static void map(struct slot *s, int pages, int kind) {
    s->kind = kind;
    s->pages = pages;
    s->prot = PROT_READ | PROT_WRITE;
    s->offset = 0;
    if (kind == PRIVATE) {
        if (s->pages > FILE_PAGES) s->pages = FILE_PAGES;
        s->offset = below(FILE_PAGES - s->pages + 1);
        s->addr = mmap(0, (long)s->pages * PAGE, s->prot, MAP_PRIVATE, file, (long)s->offset * PAGE);
    } else {
        s->addr = mmap(0, (long)pages * PAGE, s->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (below(6) == 0) madvise(s->addr, (long)pages * PAGE, MADV_HUGEPAGE);
    }
    must((long)s->addr, "mmap");
    for (int i = 0; i < s->pages; i++) s->value[i] = fresh(s, i);
}

static void unmap(struct slot *s) {
    if (s->addr) must(munmap(s->addr, (long)s->pages * PAGE), "munmap");
    s->addr = 0;
}

static int deep(int n) {
    volatile char block[PAGE * 3];
    memset((char *)block, n, sizeof block);
    int sum = n > 0 ? deep(n - 1) : 0;
    for (unsigned i = 0; i < sizeof block; i += 511)
        if (block[i] != (char)n) {
            printf("step %d: the stack at depth %d\n", step, n);
            exit(1);
        }
    return sum + block[7];
}

static char *heap;
static int heap_pages;
static uint64_t heap_value[600];

static void change_heap(void) {
    int want = below(600);
    must(brk(heap + (long)want * PAGE), "brk");
    for (int i = heap_pages; i < want; i++) heap_value[i] = 0;
    heap_pages = want;
}

static void use_heap(void) {
    if (!heap_pages) return;
    int page = below(heap_pages);
    uint64_t *words = (uint64_t *)(heap + (long)page * PAGE);
    for (int i = 0; i < WORDS; i += 37)
        if (words[i] != heap_value[page]) {
            printf("step %d: heap page %d of %d: %llx, not %llx\n", step, page, heap_pages,
                   (unsigned long long)words[i], (unsigned long long)heap_value[page]);
            exit(1);
        }
    if (below(2)) {
        uint64_t value = draw();
        for (int i = 0; i < WORDS; i++) words[i] = value;
        heap_value[page] = value;
    }
}

static void discard(struct slot *s, int from, int count, int advice) {
    must(madvise(s->addr + (long)from * PAGE, (long)count * PAGE, advice), "madvise");
    for (int i = from; i < from + count; i++) {
        if (advice == MADV_DONTNEED)
            s->value[i] = fresh(s, i);
        else if (s->prot & PROT_WRITE) /* it may be zero now, or not */
            fill(s, i, draw());
    }
}

static void change(struct slot *s) {
    int from = below(s->pages), count = 1 + below(s->pages - from);
    char *at = s->addr + (long)from * PAGE;
    long len = (long)count * PAGE;
    switch (below(16)) {
    case 0:
        unmap(s);
        return;
    case 1: /* cut its end off */
        if (from == 0) return;
        must(munmap(at, (long)(s->pages - from) * PAGE), "munmap");
        s->pages = from;
        return;
    case 2: { /* move or grow it */
        if (s->kind == PRIVATE) return;
        int want = 1 + below(MOST - 1);
        int prot = s->prot;
        char *to = mremap(s->addr, (long)s->pages * PAGE, (long)want * PAGE, MREMAP_MAYMOVE);
        if (to == MAP_FAILED) {
            printf("step %d: mremap of %p, %d pages\n", step, s->addr, s->pages);
            fflush(stdout);
            int maps = open("/proc/self/smaps", O_RDONLY);
            char text[4096];
            for (long n; (n = read(maps, text, sizeof text)) > 0;) write(2, text, n);
        }
        must((long)to, "mremap");
        for (int i = s->pages; i < want; i++) s->value[i] = 0;
        s->addr = to;
        s->pages = want;
        s->prot = prot;
        return;
    }
    case 3: { /* all of it, so that it stays one mapping */
        static const int prots[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC};
        s->prot = prots[below(4)];
        must(mprotect(s->addr, (long)s->pages * PAGE, s->prot), "mprotect");
        return;
    }
    case 4:
        discard(s, from, count, MADV_DONTNEED);
        return;
    case 5:
        if (s->kind != PRIVATE && s->prot & PROT_WRITE) discard(s, from, count, MADV_FREE);
        return;
    case 6: /* other memory in its place */
        must(munmap(s->addr, (long)s->pages * PAGE), "munmap");
        must((long)mmap(s->addr, (long)s->pages * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), "mmap fixed");
        s->prot = PROT_READ | PROT_WRITE;
        s->kind = ANON;
        for (int i = 0; i < s->pages; i++) s->value[i] = 0;
        return;
    case 7: /* write, throw away, read: what a page shows may be the file's again */
        if (!(s->prot & PROT_WRITE)) return;
        fill(s, from, draw());
        discard(s, from, 1, MADV_DONTNEED);
        if (below(2)) check(s, from);
        return;
    case 8: { /* as compilers at run time do: write what may not be written otherwise */
        must(mprotect(s->addr, (long)s->pages * PAGE, PROT_READ | PROT_WRITE), "mprotect");
        fill(s, from, draw());
        must(mprotect(s->addr, (long)s->pages * PAGE, PROT_READ), "mprotect");
        s->prot = PROT_READ;
        return;
    }
    case 9: /* out to swap, where there is any */
        madvise(at, len, 21 /* MADV_PAGEOUT */);
        return;
    default:
        for (int i = from; i < from + count && i < from + 40; i++)
            if (s->prot & PROT_WRITE && below(3) == 0) fill(s, i, below(8) ? draw() : 0);
    }
}

int main(int argc, char **argv) {
    static char out[1 << 16];
    setvbuf(stdout, out, _IOFBF, sizeof out); /* or it would live in the heap */
    state = strtoull(argv[1], 0, 0);
    int steps = atoi(argv[2]);
    long megabytes = argc > 4 ? atol(argv[4]) : 0;
    file = open(argv[3], O_RDONLY);
    must(file, argv[3]);
    heap = sbrk(0);
    heap = (char *)(((uintptr_t)heap + PAGE - 1) & -(uintptr_t)PAGE);
    /* A bulk whose copying takes time, so that the rest changes meanwhile. */
    uint64_t *bulk = 0;
    if (megabytes) {
        bulk = mmap(0, megabytes << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must((long)bulk, "mmap");
        for (long i = 0; i < megabytes << 17; i++) bulk[i] = i * 0x9e3779b97f4a7c15ull;
    }
    struct timespec pause = {0, 50000};
    for (step = 1; step <= steps; step++) {
        struct slot *s = &slots[below(SLOTS)];
        if (!s->addr)
            map(s, 1 + below(below(4) ? 60 : MOST - 1), below(4) == 0 ? PRIVATE : ANON);
        else {
            if (below(3) == 0) check(s, below(s->pages));
            change(s);
        }
        if (below(20) == 0) change_heap();
        use_heap();
        if (below(50) == 0) digest += deep(below(150));
        if (bulk && below(10) == 0) {
            long i = draw() % ((unsigned long)megabytes << 17);
            if (bulk[i] != i * 0x9e3779b97f4a7c15ull) {
                printf("step %d: bulk at %ld\n", step, i);
                exit(1);
            }
        }
        if (step % 8 == 0) nanosleep(&pause, 0);
        if (step % 500 == 0) {
            for (int i = 0; i < SLOTS; i++)
                for (int page = 0; slots[i].addr && page < slots[i].pages; page++) check(&slots[i], page);
            printf("%d %016llx\n", step, (unsigned long long)digest);
            fflush(stdout);
        }
    }
    for (long i = 0; bulk && i < megabytes << 17; i++)
        if (bulk[i] != i * 0x9e3779b97f4a7c15ull) {
            printf("bulk at %ld in the end\n", i);
            exit(1);
        }
    puts("all as it should be");
    return 0;
}
