-- The one vacuum of a finished day table: no later one has to read it for old transaction ids.
vacuum (freeze, skip_locked) shardmq.batch_{partition}_{day}
