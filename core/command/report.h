/* core/command/report.h - run.json, the file that says what a run was and what it measured.  [main] */
#ifndef PHX__REPORT_H
#define PHX__REPORT_H
#include "checkpoint/checkpoint.h"
#include "command/run_result.h"

/* Proportional set size of this process, or -1. */
int64_t phx__pss_bytes(void);
/* run.json; result NULL while the run goes on; resumed (or NULL) is added to its list of resumes, which stays.  Written
 * beside and renamed. */
phx_status phx__run_json_write(const phx__runtime *rt, const phx__run_result *result, const phx__resumed *resumed,
                               phx_error *err);
#endif
