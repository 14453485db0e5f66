/* Keeps a pattern in vector registers, the x87 stack and memory of every kind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <immintrin.h>
static __thread long counter = 1000;
__attribute__((noinline, target("avx"))) static unsigned long spin(unsigned long n, unsigned long seed) {
  unsigned long acc = seed, out[4] __attribute__((aligned(32)));
  __m256i v = _mm256_set1_epi64x(seed);
  __asm__ volatile("vmovdqa %[v], %%ymm13\n 1: imul %[m], %[a]\n add %[d], %[a]\n dec %[n]\n jnz 1b\n vmovdqa %%ymm13, %[o]\n"
    : [a] "+r"(acc), [n] "+r"(n), [o] "=m"(out) : [v] "m"(v), [m] "r"(6364136223846793005ul), [d] "r"(1442695040888963407ul) : "xmm13", "cc");
  for (int i = 0; i < 4; i++) if (out[i] != seed) { printf("VECTOR STATE LOST\n"); break; }
  return acc;
}
int main(int c, char **v) {
  int rounds = c > 1 ? atoi(v[1]) : 60, has_avx = __builtin_cpu_supports("avx");
  size_t size = 4 << 20;
  unsigned char *big = malloc(size);
  for (size_t i = 0; i < size; i++) big[i] = (i * 2654435761u) >> 24;
  unsigned long h = 1; double before = 0; long double x = 1.0L;
  for (int i = 0; i < rounds; i++) {
    if (has_avx) h = spin(30000000, h ^ i);
    for (int k = 0; k < 100000; k++) x = x * 1.0000001L + 0.5L;
    void *a = malloc(10000 + i * 3000); memset(a, i, 10000);
    if (i % 7 == 6) { char *b = malloc(1 << 20); memset(b, i, 1 << 20); for (int q = 0; q < 1 << 20; q += 4096) h += b[q]; free(b); }
    unsigned long s = 0;
    for (size_t q = 0; q < size; q += 511) s = s * 31 + big[q];
    big[(i * 7919) % size] ^= i;
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    double now = t.tv_sec + t.tv_nsec * 1e-9;
    if (now < before) printf("TIME WENT BACK by %g\n", before - now);
    before = now;
    struct timeval tv; gettimeofday(&tv, 0);
    if (tv.tv_sec + tv.tv_usec * 1e-6 < before - 1e-3) printf("CLOCKS DIFFER\n");
    printf("%d %016lx %016lx %ld %.6Lg %d\n", i, h, s, counter++, x, getpid() == getpid());
    fflush(stdout);
  }
  return 7;
}
