/* core/base/identity.h - who this process is: a rank of phalanx, torchrun, mpirun or srun, or nobody's; from the
 * environment.
 *
 * [main]: reads the environment and keeps nothing. */
#ifndef PHX__IDENTITY_H
#define PHX__IDENTITY_H
#include <phalanx/job.h>
#include <stdbool.h>

#define PHX__STORE_PORT "29500" /* without MASTER_PORT; torchrun's */

enum { PHX__ALONE = 0, PHX__BY_PHALANX, PHX__BY_TORCHRUN, PHX__BY_MPIRUN, PHX__BY_SRUN };
typedef struct phx__identity {
  int32_t by; /* PHX__BY_* */
  int32_t rank, size, local_rank, local_size;
  int fd;       /* PHX__BY_PHALANX: the inherited memfd, else -1 */
  char key[96]; /* names the job, under another launcher */
  bool several; /* on several machines: they meet at rank 0's address */
  char address[256], port[8];
} phx__identity;
int32_t phx__identity_kind(void); /* PHX__BY_*: whose variables are there at all */
phx_status phx__identity_read(phx__identity *out, phx_error *err);

bool phx__job_is_rank(void); /* a launcher started it as a rank */
/* True if this process prints the messages that concern the whole job. */
bool phx__job_speaks(void);
/* Half of what torchrun's manner needs is in the environment and is no launcher's: what, as a clause; NULL: nothing. */
const char *phx__job_half_set(void);
/* How many ranks torchrun, mpirun or srun (*launcher) have started; 0: none of them, or it cannot be read. */
int32_t phx__job_foreign_size(const char **launcher);
int32_t phx__job_local_size(int32_t ranks); /* how many of a run's ranks are on this machine */
#endif
