-- That was done.
-- $1 partition  $2 day
update shardmq.day set frozen = true where partition = $1 and day = $2
