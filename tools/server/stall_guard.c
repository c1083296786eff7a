/* Preloaded into the Triton server (stall_guard.py says why): a wait for a stub that has timed out goes on for a while. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PATIENCE_S = 3 };

static int (*timed_wait)(sem_t *, const struct timespec *);
static int is_server;

__attribute__((constructor)) static void start(void) {
    timed_wait = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    is_server = strcmp(program_invocation_short_name, "tritonserver") == 0;
    if (!is_server) return;
    const char *others = strchr(getenv("LD_PRELOAD"), ':'); /* stubs and workers are not to have it */
    if (others)
        setenv("LD_PRELOAD", others + 1, 1);
    else
        unsetenv("LD_PRELOAD");
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    if (timed_wait(semaphore, until) == 0) return 0;
    if (errno != ETIMEDOUT || !is_server) return -1;
    struct timespec later;
    clock_gettime(CLOCK_REALTIME, &later);
    later.tv_sec += PATIENCE_S;
    return timed_wait(semaphore, &later);
}
