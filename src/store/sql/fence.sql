-- Asks for a batch that is to be given up or sent elsewhere; where it is not there, it never will be.
-- $1 partition  $2 producer  $3 sequence  $4 earliest and $5 latest day that an attempt has named
select shardmq.fence_batch($1, $2, $3, $4, $5)
