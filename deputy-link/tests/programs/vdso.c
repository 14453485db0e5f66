/* Is in functions of the vDSO nearly always, at times with a pointer that faults. */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
#include <time.h>

static sigjmp_buf back_here;
static void on_fault(int signal) { siglongjmp(back_here, signal); }

int main(void) {
  struct timespec t, last = {0, 0}, start;
  struct timeval v;
  volatile long back = 0, faults = 0, wrong = 0, n = 0;
  signal(SIGSEGV, on_fault);
  clock_gettime(CLOCK_MONOTONIC, &start);
  do {
    for (int i = 0; i < 50000; i++) {
      clock_gettime(CLOCK_MONOTONIC, &t);
      if (t.tv_sec < last.tv_sec || (t.tv_sec == last.tv_sec && t.tv_nsec < last.tv_nsec)) back++;
      last = t;
      clock_gettime(CLOCK_REALTIME, &t);
      gettimeofday(&v, 0);
      if (v.tv_sec < t.tv_sec || v.tv_sec > t.tv_sec + 5) wrong++;
      n++;
    }
    if (n % 1000000 == 0) {
      if (sigsetjmp(back_here, 1) == 0) {
        clock_gettime(CLOCK_MONOTONIC, (struct timespec *)8);
        wrong++;
      } else {
        faults++;
      }
    }
    clock_gettime(CLOCK_MONOTONIC, &t);
  } while (t.tv_sec - start.tv_sec < 4);
  printf("back %ld wrong %ld faulted %d\n", back, wrong, faults > 0);
  return 5;
}
