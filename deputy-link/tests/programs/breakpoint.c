/* Runs into a breakpoint that nobody has set. */
#include <time.h>
int main(void) {
  struct timespec pause = {0, 400000000};
  nanosleep(&pause, 0);
  __asm__ volatile("int3");
  return 0;
}
