-- Takes or keeps the upkeep of a node. Primary key.
-- $1 holder  $2 lease in seconds
select shardmq.keep_up($1, $2)
