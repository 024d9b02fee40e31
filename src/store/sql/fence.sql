-- Asks for a batch that is to be given up or sent elsewhere; where it is not there, it never will be.
-- $1 partition  $2 producer  $3 sequence  $4 day of the first attempt
select shardmq.fence_batch($1, $2, $3, $4)
