/* tests/support/foreign.h - ranks that the test starts itself, with the environment that another launcher gives them.
 *
 * Nobody watches these ranks but the test: what they find out about each other, they find out themselves. */
#ifndef TEST_FOREIGN_H
#define TEST_FOREIGN_H
#include <sys/types.h>

enum { FOREIGN_TORCHRUN, FOREIGN_MPIRUN, FOREIGN_SRUN, FOREIGN_KINDS };
enum { FOREIGN_RANKS = 8 };
extern const char *const foreign_names[FOREIGN_KINDS];

typedef struct foreign {
  char dir[64];
  int n;
  pid_t pids[FOREIGN_RANKS]; /* 0: waited for */
} foreign;

/* `phalanx ARGV...` (NULL-terminated) in dir, once per rank; each writes dir/log-R. */
foreign foreign_start(const char *dir, int kind, int ranks, const char *const *argv);
/* The status of a rank that ends within `seconds`, 128 + its signal, or -1: it is still there. */
int foreign_status(foreign *f, int rank, double seconds);
/* What a rank has written; freed with free(). */
char *foreign_log(const foreign *f, int rank);
/* Kills what is left, and waits for it. */
void foreign_end(foreign *f);
#define FOREIGN(dir, kind, ranks, ...) foreign_start(dir, kind, ranks, (const char *const[]){__VA_ARGS__, NULL})
#endif
