# Variables with which mpirun works on any machine: `source env.sh` before commands typed by hand.
# The Makefile and the tests read this same file: lines of `export NAME=value ...`, no expansions.
# All of it concerns Open MPI, the last line MPICH; neither minds the other's. A value set before is
# replaced.

# Open MPI refuses to run as root, as which containers run. (The PRTE_ALLOW_* names do not work.)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# More ranks than cores are allowed. For ONE host: on several it piles all ranks on the first.
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

# No binding: the default binds to cores 0, 1, .. and two jobs at once would share core 0.
export PRTE_MCA_hwloc_default_binding_policy=none

# Skip a search for fabrics that takes a second at every start, and a message about UCX.
export OMPI_MCA_btl=^ofi OMPI_MCA_osc=^ucx

# Between hosts over TCP: a longer message than this waits for three latencies in place of one.
export OMPI_MCA_btl_tcp_eager_limit=2200000

# MPICH between hosts over TCP: how much it takes from a connection each time it is asked. With its
# own 64 KiB a large message needs to be asked for often, which costs the computation its time.
export UCX_TCP_RX_SEG_SIZE=1m
