r"""Plan a mixture with several processes, each taking datasets as it gets free.

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml \
    recipes/plan.py mixture.yaml --output runs/mixture/plan
"""

from merit_hf.planner import main

if __name__ == "__main__":
    main()
