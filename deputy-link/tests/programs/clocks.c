/* Reads every clock, in every way, without pause. */
#include <stdio.h>
#include <sys/time.h>
#include <time.h>
#include <sched.h>
int main(void) {
  struct timespec t, last = {0, 0};
  struct timeval v; struct timezone z;
  long back = 0, bad = 0, n = 0;
  struct timespec start; clock_gettime(CLOCK_MONOTONIC, &start);
  do {
    for (int i = 0; i < 200; i++) {
      clock_gettime(CLOCK_MONOTONIC, &t);
      if (t.tv_sec < last.tv_sec || (t.tv_sec == last.tv_sec && t.tv_nsec < last.tv_nsec)) back++;
      last = t; n++;
    }
    z.tz_minuteswest = 5;
    bad += gettimeofday(&v, &z) != 0 || z.tz_minuteswest != 0;
    bad += time(0) < 1000;
    /* Processor time used away is not seen after the return, so it may go back. */
    bad += clock() < 0;
    bad += clock_getres(CLOCK_REALTIME, &t) != 0;
    bad += sched_getcpu() < 0;
    clock_gettime(CLOCK_MONOTONIC, &t);
  } while (t.tv_sec - start.tv_sec < 3);
  printf("back %ld bad %ld enough %d\n", back, bad, n > 1000);
  return 4;
}
