"""What each launcher says about the ranks, and how it is read."""

from bigmix.cluster.world import World, without_local_rank, world_of


def test_torchrun_and_deepspeed_name_the_ranks_alike():
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert world_of(environment) == World(rank=5, local_rank=1, size=8, local_size=4)
    assert world_of(environment).num_machines == 2


def test_slurm_names_the_ranks_too():
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "6",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    world = world_of(environment)
    assert world == World(rank=3, local_rank=1, size=6, local_size=2) and world.num_machines == 3


def test_a_process_without_a_launcher_is_alone():
    world = world_of({})
    assert world == World(rank=0, local_rank=0, size=1, local_size=1)
    assert world.is_first and world.num_machines == 1


def test_the_local_rank_that_deepspeed_puts_first_is_left_out():
    given = ["--local_rank=1", "recipe.yaml", "train.lr=1e-5"]
    assert without_local_rank(given) == ["recipe.yaml", "train.lr=1e-5"]
