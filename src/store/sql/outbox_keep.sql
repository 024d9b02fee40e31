-- Takes or keeps the relaying from a database. One row.
-- $1 holder  $2 uuid[]: its names before  $3 cluster  $4 lease in seconds
select shardmq.keep_relaying($1, $2, $3, $4)
