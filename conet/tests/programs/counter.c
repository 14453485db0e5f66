/* Computes, reads a file and prints, `argv[1]` rounds long. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int c, char **v) {
  int rounds = c > 1 ? atoi(v[1]) : 10;
  unsigned long h = 1;
  for (int i = 0; i < rounds; i++) {
    for (int k = 0; k < 20000000; k++) h = h * 6364136223846793005UL + 1442695040888963407UL + (h >> 29);
    char line[64] = {0};
    int fd = c > 2 ? open(v[2], O_RDONLY) : -1;
    long n = fd < 0 ? -1 : pread(fd, line, sizeof line - 1, i % 100);
    if (fd >= 0) close(fd);
    printf("%d %016lx %ld %.20s\n", i, h, n, line);
    fflush(stdout);
  }
  return 7;
}
