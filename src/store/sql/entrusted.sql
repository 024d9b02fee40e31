-- What is acknowledged under a fence, and on which server that is.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch
select c.acked_id, c.acked_ahead::text, pg_postmaster_start_time()
  from shardmq.cursor c
 where c.group_name = $1 and c.partition = $2
   and (c.owner, c.epoch, c.reset_epoch) = ($3, $4, $5)
