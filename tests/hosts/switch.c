/* Emulated hosts joined by an Ethernet switch whose links have a latency and a rate.

       switch HOSTS DELAY_US RATE_MBIT FOLDER COMMAND [ARGUMENT...]

   Every host is a process with its own network, hostname, System V memory, /dev/shm and
   temporary directory; host i is called h<i> and has the address 10.77.0.<i>. COMMAND runs beside
   them and its exit code is ours. FOLDER holds the file `hosts`, which becomes everybody's
   /etc/hosts, and an empty directory `tmp`, which becomes every host's own.

   All processes live in one new process namespace: the switch is process 1, host i is process
   i + 1. The kernel ends all of them when process 1 ends, and process 1 when whoever started us
   does; networks and mounts go with their last process, so nothing is ever left to clear away.

   A link is full duplex. A packet occupies its sender's link and then, DELAY_US later, its
   receiver's, bit by bit (cut through): alone it takes DELAY_US + bits / RATE, and several
   senders to one host share that host's rate. What a host sends to several others takes turns, as
   in Linux's usual queue: an acknowledgement is not behind megabytes that go elsewhere. RATE_MBIT
   0 means no limit. Written because netem is missing from many kernels. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 64, HEADER = 10, LARGEST = 70000 };
static const long MOST_QUEUED = 64L << 20; /* bytes that may wait for one host; more is dropped */
static const long AHEAD_NS = 100000;       /* sent so early that a late wake-up leaves no gap */

/* A packet with the header (struct virtio_net_hdr) that says how it is to be segmented. */
typedef struct Packet {
    struct Packet *next;
    long due;
    int length;
    unsigned char bytes[];
} Packet;

typedef struct {
    Packet *first, **last;
} Queue;

/* A host's end of its link: what it wants to send to each other host, and what is on its way. */
typedef struct {
    int tap;
    Queue leaving[MOST_HOSTS], arriving;
    int num_leaving, turn;
    long sending_until, receiving_until, queued;
} Port;

static Port ports[MOST_HOSTS];
static int hosts;
static long delay_ns, dropped;
static double ns_per_byte;

static void fail(const char *what) {
    fprintf(stderr, "switch: %s: %s\n", what, strerror(errno));
    exit(125);
}

static void check(int result, const char *what) {
    if (result < 0)
        fail(what);
}

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static long later(long a, long b) { return a > b ? a : b; }

/* --- hosts ---------------------------------------------------------------------------------- */

static void be_a_host(int i, const char *folder, int ready) {
    char text[4096];
    check(unshare(CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNS), "unshare");
    snprintf(text, sizeof text, "h%d", i);
    check(sethostname(text, strlen(text)), "sethostname");
    snprintf(text, sizeof text, "%s/hosts", folder);
    check(mount(text, "/etc/hosts", NULL, MS_BIND, NULL), "mount /etc/hosts");
    snprintf(text, sizeof text, "%s/tmp", folder);
    check(mount("tmpfs", text, "tmpfs", 0, NULL), "mount the temporary directory");
    check(mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL), "mount /dev/shm");
    check(write(ready, "r", 1), "write");
    close(ready); /* so that the reader sees the end when a host fails */
    for (;;)
        pause();
}

/* The host's network card: a tap whose other end is the switch. The calling process moves to the
   host's network and stays there, which does no harm: it has the open files it needs. */
static void plug_in(int i) {
    char text[512];
    snprintf(text, sizeof text, "/proc/%d/ns/net", i + 1);
    int network = open(text, O_RDONLY | O_CLOEXEC);
    check(network, text);
    check(setns(network, CLONE_NEWNET), "setns");
    close(network);

    Port *port = &ports[i - 1];
    port->arriving.last = &port->arriving.first;
    for (int j = 0; j < hosts; j++)
        port->leaving[j].last = &port->leaving[j].first;
    port->tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    check(port->tap, "/dev/net/tun");
    struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    check(ioctl(port->tap, TUNSETIFF, &request), "TUNSETIFF");
    check(ioctl(port->tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6), "TUNSETOFFLOAD");
    /* TCP as on a tuned cluster: no pacing (some kernels have BBR for all), a window that is wide
       from the start and stays so in pauses, no delay of acknowledgements. Else the time of a
       message would be that of TCP's guesses: 50 ms more now and then. The card's address ends
       with the host's number. */
    snprintf(text, sizeof text,
             "cd /proc/sys/net/ipv4 && echo reno > tcp_congestion_control"
             " && echo 0 > tcp_slow_start_after_idle"
             " && ip link set eth0 address 02:00:00:00:00:%02x txqueuelen 4000"
             " && ip addr add 10.77.0.%d/24 dev eth0 && ip link set eth0 up"
             " && ip route replace 10.77.0.0/24 dev eth0 src 10.77.0.%d quickack 1 initcwnd 700"
             " && ip link set lo up",
             i, i, i);
    if (system(text) != 0)
        fail("ip");
}

/* --- the switch ----------------------------------------------------------------------------- */

static void push(Queue *queue, Packet *packet) {
    packet->next = NULL;
    *queue->last = packet;
    queue->last = &packet->next;
}

static Packet *pop(Queue *queue) {
    Packet *packet = queue->first;
    queue->first = packet->next;
    if (queue->first == NULL)
        queue->last = &queue->first;
    return packet;
}

/* Packets of any length have LARGEST bytes and are used again: memory that malloc gives back to the
   system and fetches anew for each costs as much processor time as moving the bytes. */
static Packet *spare;

static Packet *new_packet(void) {
    Packet *packet = spare;
    if (packet != NULL)
        spare = packet->next;
    else if ((packet = malloc(sizeof *packet + LARGEST)) == NULL)
        fail("malloc");
    return packet;
}

static void free_packet(Packet *packet) {
    packet->next = spare;
    spare = packet;
}

static long time_of(const Packet *packet) { return (packet->length - HEADER) * ns_per_byte; }

/* Take over all that the host wants to send; 1 if there was anything. */
static int take(Port *from) {
    Packet *packet = new_packet();
    int any = 0;
    while ((packet->length = read(from->tap, packet->bytes, LARGEST)) >= HEADER + 14) {
        const unsigned char *address = packet->bytes + HEADER;
        any = 1;
        for (int j = 0; j < hosts; j++) {
            int all = address[0] & 1; /* a broadcast goes to all others */
            if (all ? &ports[j] == from : address[5] != j + 1)
                continue;
            Packet *sent = packet;
            if (all) {
                sent = new_packet();
                memcpy(sent->bytes, packet->bytes, sent->length = packet->length);
            } else
                packet = new_packet();
            push(&from->leaving[j], sent);
            from->num_leaving++;
            if (!all)
                break; /* the address is no longer ours to read */
        }
    }
    free_packet(packet);
    return any;
}

/* Put packets on the host's link while it is free, for each destination in turn. */
static void send_on(Port *from) {
    long time;
    while (from->num_leaving > 0 && (time = now()) + AHEAD_NS >= from->sending_until) {
        do
            from->turn = (from->turn + 1) % hosts;
        while (from->leaving[from->turn].first == NULL);
        Port *to = &ports[from->turn];
        Packet *packet = pop(&from->leaving[from->turn]);
        from->num_leaving--;
        long sent = later(from->sending_until, time);
        from->sending_until = sent + time_of(packet);
        if (to->queued + packet->length > MOST_QUEUED) {
            free_packet(packet);
            dropped++;
            continue;
        }
        to->receiving_until = later(to->receiving_until, sent + delay_ns) + time_of(packet);
        packet->due = to->receiving_until;
        to->queued += packet->length;
        push(&to->arriving, packet);
    }
}

/* Hand the host what is due; 1 if there was anything. */
static int deliver(Port *to) {
    int any = 0;
    while (to->arriving.first != NULL && to->arriving.first->due <= now()) {
        Packet *packet = pop(&to->arriving);
        if (write(to->tap, packet->bytes, packet->length) < 0)
            dropped++;
        to->queued -= packet->length;
        free_packet(packet);
        any = 1;
    }
    return any;
}

/* Sleep until something arrives, is due, or a child ends. */
static void rest(const sigset_t *open_signals) {
    struct pollfd polled[MOST_HOSTS];
    long time = now(), next = time + 1000000000L;
    for (int i = 0; i < hosts; i++) {
        const Port *port = &ports[i];
        polled[i] = (struct pollfd){.fd = port->tap, .events = POLLIN};
        if (port->num_leaving > 0 && port->sending_until - AHEAD_NS < next)
            next = port->sending_until - AHEAD_NS;
        if (port->arriving.first != NULL && port->arriving.first->due < next)
            next = port->arriving.first->due;
    }
    long left = later(next - time, 0);
    struct timespec limit = {left / 1000000000L, left % 1000000000L};
    ppoll(polled, hosts, &limit, open_signals);
}

static volatile sig_atomic_t a_child_ended;
static void on_child(int number) { (void)number, a_child_ended = 1; }

/* Exit code of the command if it has ended, else -1. Orphans become ours and are buried, too. */
static int ended(pid_t command) {
    int status, code = -1;
    pid_t pid;
    a_child_ended = 0;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == command)
            code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return code;
}

static int run(const char *folder, char **arguments) {
    /* The hosts' mounts must not reach the outer system, and /proc must speak of our processes. */
    check(unshare(CLONE_NEWNS), "unshare");
    check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "make mounts private");
    check(mount("proc", "/proc", "proc", 0, NULL), "mount /proc");

    int ready[2];
    check(pipe2(ready, O_CLOEXEC), "pipe");
    for (int i = 1; i <= hosts; i++) {
        pid_t pid = fork();
        check(pid, "fork");
        if (pid == 0)
            be_a_host(i, folder, ready[1]);
        if (pid != i + 1)
            fail("a host has not the process number that the agent reckons with");
    }
    close(ready[1]);
    for (int i = 0; i < hosts; i++) {
        char byte;
        if (read(ready[0], &byte, 1) != 1)
            return 125; /* the host has said why */
    }
    for (int i = 1; i <= hosts; i++)
        plug_in(i);

    sigset_t child, open_signals;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    check(sigprocmask(SIG_BLOCK, &child, &open_signals), "sigprocmask");
    signal(SIGCHLD, on_child);
    pid_t command = fork();
    check(command, "fork");
    if (command == 0) {
        signal(SIGCHLD, SIG_DFL);
        sigprocmask(SIG_SETMASK, &open_signals, NULL);
        execvp(arguments[0], arguments);
        fail(arguments[0]);
    }

    /* A network does not wait for a core; where this is not allowed it is a little less exact. */
    struct sched_param first = {.sched_priority = 10};
    if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first) < 0 && nice(-20) < 0)
        errno = 0;
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        int any = 0, code;
        if (a_child_ended && (code = ended(command)) >= 0)
            return code;
        for (int i = 0; i < hosts; i++)
            any |= take(&ports[i]);
        for (int i = 0; i < hosts; i++)
            send_on(&ports[i]);
        for (int i = 0; i < hosts; i++)
            any |= deliver(&ports[i]);
        if (!any)
            rest(&open_signals);
    }
}

int main(int count, char **arguments) {
    if (count < 6) {
        fprintf(stderr, "usage: switch HOSTS DELAY_US RATE_MBIT FOLDER COMMAND [ARGUMENT...]\n");
        return 125;
    }
    hosts = atoi(arguments[1]);
    delay_ns = (long)(atof(arguments[2]) * 1000);
    double rate = atof(arguments[3]);
    ns_per_byte = rate > 0 ? 8000 / rate : 0;
    if (hosts < 1 || hosts > MOST_HOSTS) {
        fprintf(stderr, "switch: from 1 to %d hosts\n", MOST_HOSTS);
        return 125;
    }
    check(unshare(CLONE_NEWPID), "unshare");
    pid_t first = fork();
    check(first, "fork");
    if (first == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int code = run(arguments[4], arguments + 5);
        if (dropped > 0)
            fprintf(stderr, "switch: %ld packets dropped\n", dropped);
        exit(code);
    }
    int status;
    while (waitpid(first, &status, 0) < 0)
        if (errno != EINTR)
            fail("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
