r"""Train one group of a plan with several processes.

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml \
    recipes/train_group.py runs/mixture/plan --group 0 --output runs/mixture/groups/0
"""

from merit_hf.training import main

if __name__ == "__main__":
    main()
