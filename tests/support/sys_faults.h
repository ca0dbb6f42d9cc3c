/* tests/support/sys_faults.h - members for phx__sys that fail as the kernel may. */
#ifndef TEST_SYS_FAULTS_H
#define TEST_SYS_FAULTS_H
#include <sys/types.h>

int fail_memfd(const char *name, unsigned flags);      /* EMFILE */
int fail_ftruncate(int fd, off_t bytes);               /* ENOSPC */
void *fail_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset); /* ENOMEM */
int fail_pidfd_open(pid_t pid); /* EPERM */
#endif
