/* Has mremap put untouched memory beside memory that was written, so that the kernel
 * joins them, and writes before and after: joined ROUNDS. Prints what it finds. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, PAGES = 64, LARGE = 64 << 20 };

static void nap(void) {
    struct timespec pause = {0, 4000000};
    nanosleep(&pause, 0);
}

static char *map(long len, int prot) {
    char *at = mmap(0, len, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) exit(2);
    return at;
}

static void fill(volatile char *at, char value) {
    for (int i = 0; i < PAGES; i++) at[i * PAGE] = value;
}

int main(int argc, char **argv) {
    int rounds = atoi(argv[1]), bad = 0;
    for (int i = 0; i < rounds; i++) {
        /* Each below the one before, and nothing below the last. */
        char *far = map(PAGES * PAGE, PROT_READ | PROT_WRITE);
        char *between = map(PAGE, PROT_NONE);
        char *near = map(LARGE, PROT_READ | PROT_WRITE);
        fill(near, 1);
        nap();
        far = mremap(far, PAGES * PAGE, LARGE, MREMAP_MAYMOVE);
        if (far == MAP_FAILED) exit(3);
        fill(near, 2);
        nap();
        fill(near, 3);
        nap();
        for (int page = 0; page < PAGES; page++) bad += near[page * PAGE] != 3;
        munmap(far, LARGE);
        munmap(between, PAGE);
        munmap(near, LARGE);
        if (i % 20 == 0) {
            printf("%d: %d lost\n", i, bad);
            fflush(stdout);
        }
    }
    return 0;
}
