// A kernel's work, shared among the threads that torch's OpenMP library has started, so that a kernel needs none of its own.
//
// It knows no kernel, and calls no library but through pointers.

#pragma once

struct team {
    long threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel; null without OpenMP
    int (*thread_number)(void), (*num_threads)(void);                // omp_get_thread_num, omp_get_num_threads
};

struct shared_work {
    const struct team *team;
    void (*compute)(const void *, long, long);
    const void *work;
    long count;
};

static void compute_share(void *shared) {
    const struct shared_work *s = shared;
    const long number = s->team->thread_number(), threads = s->team->num_threads();
    s->compute(s->work, s->count * number / threads, s->count * (number + 1) / threads);
}

// Compute all of the items, each thread of the team those from one number to another.
static void share_work(const struct team *team, void (*compute)(const void *, long, long), const void *work, long count) {
    struct shared_work shared = {team, compute, work, count};
    if (team->threads > 1 && team->parallel)
        team->parallel(compute_share, &shared, (unsigned)team->threads, 0);
    else
        compute(work, 0, count);
}
