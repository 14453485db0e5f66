/* A coroutine on a 2 KiB stack between guard bytes makes a thousand calls. */
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static unsigned char area[2048 + 2 * 4096] __attribute__((aligned(64)));
static void calls(void) {
  for (int i = 0; i < 1000; i++) {
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(SYS_getppid) : "rcx", "r11", "memory");
  }
}
int main(void) {
  struct timespec pause = {0, 400000000};
  nanosleep(&pause, 0);
  memset(area, 0xa5, sizeof area);
  unsigned char *top = area + 4096 + 2048;
  memset(area + 4096, 0, 2048);
  __asm__ volatile("mov %%rsp, %%rbx\n mov %0, %%rsp\n call *%1\n mov %%rbx, %%rsp" : : "r"(top), "r"(calls)
    : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "memory");
  for (int i = 0; i < 4096; i++)
    if (area[i] != 0xa5 || top[i] != 0xa5) { printf("guard byte %d changed\n", i); return 1; }
  printf("1000 calls, guards intact\n");
  return 0;
}
