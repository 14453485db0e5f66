/* Wrong pointers and odd arguments: the kernel's answers, whoever gives them. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#define TELL(call) do { errno = 0; long r = (long)(call); printf("%s = %ld %s\n", #call, r < 0 ? -1 : r > 1000 ? 1000 : r, strerror(errno)); } while (0)
int main(void) {
  struct timespec pause = {0, 400000000};
  nanosleep(&pause, 0);
  char *bad = (char *)8, *region = (char *)0x200000000000UL, buffer[100];
  char *edge = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  munmap(edge + 4096, 4096);
  int pipes[2]; pipe(pipes);
  TELL(write(pipes[1], bad, 10));
  TELL(read(-1, buffer, 10));
  write(pipes[1], "abcdef", 6);
  TELL(read(pipes[0], bad, 3));
  TELL(open(bad, O_RDONLY));
  TELL(open("/nonexistent/file", O_RDONLY));
  TELL(stat("/", (struct stat *)bad));
  strcpy(edge + 4090, "/etc");
  TELL(access(edge + 4090, F_OK));
  edge[4095] = 'x'; edge[4094] = 'y';
  TELL(access(edge + 4090, F_OK));
  struct iovec v[2] = {{"one ", 4}, {bad, 4}};
  TELL(writev(pipes[1], v, 1));
  TELL(writev(pipes[1], v, -1));
  TELL(poll((struct pollfd *)bad, 1, 0));
  TELL(clock_gettime(12345, &pause));
  TELL(syscall(SYS_clock_gettime, 0, bad));
  TELL(syscall(SYS_getrandom, bad, 8, 0));
  TELL(syscall(SYS_rt_sigprocmask, 0, bad, 0, 8));
  TELL(syscall(SYS_rt_sigaction, 99, 0, 0, 8));
  int pair[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
  TELL(getsockopt(pair[0], SOL_SOCKET, SO_TYPE, buffer, (socklen_t *)bad));
  TELL(fcntl(0, F_GETFD));
  TELL(close(12345));
  (void)region;
  return 3;
}
