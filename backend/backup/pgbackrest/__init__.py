"""pgBackRest, driven for clusters that outgrow dumps; nothing of it is imitated."""
