-- Ends a parked message inside a user's transaction. Nothing where the fence does not hold or it is gone.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation  $7 id
delete from shardmq.retry r
 where r.id = $7
   and exists (select from shardmq.cursor c
                where c.group_name = $1 and c.partition = $2
                  and (c.owner, c.epoch, c.reset_epoch) = ($3, $4, $5)
                  and pg_postmaster_start_time() = $6)
